"""Which parameter tokens contribute least, and the best τ without them.

A Pattention's output is a sum over its tokens, out = Σ_i S_i v_i, so what token i contributes is

    c_i = mean over positions of ‖S_i v_i‖ = mean |S_i| · ‖v_i‖

Dropping the tokens D takes at most Σ_D |S_i|·‖v_i‖ from the output (triangle inequality); the tokens with the least c
make the mean of that bound least. It is the product of activation and weight norm by which Wanda (Sun et al., 2023,
arXiv 2306.11695) ranks single weights, here for whole tokens.

What goes is felt in two ways: its own terms are missing, and the normaliser of the others is smaller. τ' makes up for
both as well as one number can. Let A = X Kᵀ be the scores, D_i how term i of the output answers to a relative change of
τ, and q = Σ_kept E / Σ E the share of the normaliser that a position keeps:

| θ | E_i | U_i | S_i | D_i | S of the kept tokens under τ' |
|---|---|---|---|---|---|
| `l2_norm_gelu` | A_i² | τ A_i / √ΣE | GELU(U_i) | U_i GELU'(U_i) v_i | GELU(t U_i), t = τ'/τ / √q |
| `gelu_l2_norm` | GELU(A_i)² | | τ GELU(A_i) / √ΣE | S_i v_i | t S_i, t = τ'/τ / √q |
| `softmax` | exp(A_i) | | τ E_i / ΣE | S_i v_i | t S_i, t = τ'/τ / q |

So with t = 1 at every position the kept terms would be what they were. To first order in t (exactly for the last two),
the output changes by (t − 1) D − R, with D = Σ_kept D_i and R = Σ_dropped S_i v_i. Least squares over all positions:

    τ'/τ = Σ ⟨D/p, D + R⟩ / Σ ‖D/p‖²,   p = √q (softmax: q)

Without R this is a mean of √q: the kept tokens' weights stay as they are on average; R makes it larger where the lost
terms point the way of the others. Where the dropped tokens have zero keys, as `zero_key` leaves them, p is 1 and R is 0,
so τ' is τ, and pruning undoes that growth to the last bit; after `gram`, τ' is √n_old to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.checks import check_whole_number
from megatron_tf.config.schema import Activation
from megatron_tf.errors import ArgumentError
from megatron_tf.model.checks import check_pattention

_SCORE_ELEMENTS = 2**22  # of [positions, n] at once: 16 MiB in fp32


def summed_contributions(
    x: Tensor, key_tokens: Tensor, value_tokens: Tensor, scale: float, activation: Activation
) -> Tensor:
    """Σ over positions of |S_i|·‖v_i‖, fp64 [n]; x [positions, d_in], keys [n, d_in], values [n, d_out]."""
    check_pattention(x, key_tokens, value_tokens, scale, activation)
    norms = torch.linalg.vector_norm(value_tokens, dim=-1, dtype=torch.float64)
    total = torch.zeros_like(norms)
    for scores in _scores(x, key_tokens):
        weights, _, _ = _weights(scores, scale, activation)
        total += weights.abs().sum(0, dtype=torch.float64)
    return total * norms


def summed_scale_terms(
    x: Tensor, key_tokens: Tensor, value_tokens: Tensor, kept: Tensor, scale: float, activation: Activation
) -> tuple[float, float]:
    """(Σ ⟨D/p, D + R⟩, Σ ‖D/p‖²) over positions; their quotient, over all the data, is τ'/τ.

    x [positions, d_in], keys [n, d_in], values [n, d_out]; `kept`: rows of them that stay [n_new].
    """
    check_pattention(x, key_tokens, value_tokens, scale, activation)
    check_kept("kept", kept, key_tokens.shape[0])
    stays = torch.zeros(key_tokens.shape[0], dtype=torch.bool)
    stays[kept] = True
    above, below = 0.0, 0.0
    for scores in _scores(x, key_tokens):
        weights, answers, energies = _weights(scores, scale, activation)
        lost = weights[:, ~stays] @ value_tokens[~stays]
        answer = (answers[:, stays] @ value_tokens[stays]).double()
        share = _share(energies[:, stays], energies[:, ~stays])
        if activation != "softmax":
            share = share.sqrt()
        answer_now = torch.where(share > 0, answer / share, 0)
        above += float((answer_now * (answer + lost)).sum())
        below += float((answer_now * answer_now).sum())
    return above, below


def largest(contributions: Tensor, count: int) -> Tensor:
    """The rows [count], ascending, of the `count` largest entries of [n]; of equal ones the older token stays."""
    check_whole_number("count", count, 1, len(contributions))
    return contributions.sort(descending=True, stable=True).indices[:count].sort().values


def check_kept(name: str, rows: Tensor, tokens: int | None = None) -> None:
    """ArgumentError unless `rows` are numbers of tokens, ascending, below `tokens`."""
    if rows.dim() != 1 or not len(rows) or rows.dtype != torch.int64 or (rows.diff() <= 0).any() or rows[0] < 0:
        raise ArgumentError(f"{name}: the rows that stay must be int64 [1 or more], ascending, from 0 on.")
    if tokens is not None and rows[-1] >= tokens:
        raise ArgumentError(f"{name}: names row {int(rows[-1])}, but there are {tokens} tokens.")


def _scores(x: Tensor, key_tokens: Tensor) -> Iterator[Tensor]:
    """A = X Kᵀ, some positions at a time."""
    for part in x.split(max(1, _SCORE_ELEMENTS // key_tokens.shape[0])):
        yield part @ key_tokens.mT


def _weights(scores: Tensor, scale: float, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """S, its answer dS/dlog τ, and E, each [positions, n]. 0 where all scores of a position are 0, but for softmax."""
    if activation == "softmax":
        energies = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = energies * (scale / energies.sum(-1, keepdim=True))
        return weights, weights, energies
    normed = F.gelu(scores) if activation == "gelu_l2_norm" else scores
    norm = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
    weights = normed * torch.where(norm > 0, scale / norm, 0)
    if activation == "gelu_l2_norm":
        return weights, weights, normed.square()
    return F.gelu(weights), torch.ops.aten.gelu_backward(weights, weights), normed.square()


def _share(kept: Tensor, dropped: Tensor) -> Tensor:
    """q [positions, 1], fp64: exactly 1 where all dropped energies are 0, and 0 where all kept ones are."""
    held, lost = (part.sum(-1, keepdim=True, dtype=torch.float64) for part in (kept, dropped))
    return torch.where(held > 0, held / (held + lost), 0)
