"""The parameter tokens that contribute least, and the best τ without them.

A Pattention's output is a sum over its tokens, out = Σ_i S_i v_i, so the contribution of token i is

    c_i = mean over positions of ‖S_i v_i‖ = mean |S_i| · ‖v_i‖

Without their terms the output changes by at most the sum of |S_i|·‖v_i‖ over the dropped tokens (triangle inequality).
Dropping the tokens with the least c minimises the mean of that bound. Wanda (Sun et al., 2023, arXiv 2306.11695) ranks
single weights by the same product of activation and weight norm; here it ranks whole tokens.

Dropped tokens have two effects: their own terms are missing, and the normaliser of the others is smaller. τ' corrects
both as well as one number can. Let D_i = dS_i/d log τ · v_i be the response of term i of the output to a relative
change of τ, and q = Σ_kept E / Σ E the share of the normaliser that a position keeps, where τ is divided by
(ΣE)^`normaliser_power` (`ScoreFunction`: 1/2 for a norm, 1 for a sum). With p = q^`normaliser_power`, the kept tokens
under τ' have the weights that they had under t times τ, t = τ'/τ / p.

So with t = 1 at every position the kept terms would be unchanged. To first order in t (exactly where S is
proportional to τ), the output changes by (t − 1) D − R, with D = Σ_kept D_i and R = Σ_dropped S_i v_i. Least squares
over all positions:

    τ'/τ = Σ ⟨D/p, D + R⟩ / Σ ‖D/p‖²

Without R this is a mean of p, which keeps the weights of the kept tokens unchanged on average. R makes it larger where
the lost terms point in the direction of the others. Where the dropped tokens have zero keys, as new ones of `zero_key`
have, p is 1 and R is 0, so τ' is τ, and pruning undoes that growth to the last bit. After `gram` by keys, τ' is the
τ before the growth, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tf.activations.function import score_function
from megatron_tf.checks import check_whole_number
from megatron_tf.errors import ArgumentError
from megatron_tf.model.checks import check_pattention

SCORE_ELEMENTS = 2**22  # the most scores [positions, n] in memory: 16 MiB in fp32


def summed_contributions(x: Tensor, key_tokens: Tensor, value_tokens: Tensor, scale: float, activation: str) -> Tensor:
    """Σ over positions of |S_i|·‖v_i‖: fp64 [n].

    x [positions, d_in], keys [n, d_in], values [n, d_out]. ArgumentError when they do not fit together.
    """
    check_pattention(x, key_tokens, value_tokens, scale, activation)
    norms = torch.linalg.vector_norm(value_tokens, dim=-1, dtype=torch.float64)
    total = torch.zeros_like(norms)
    function = score_function(activation)
    for scores in _scores(x, key_tokens):
        _, weights = function.statistic_and_weights(scores, scale)
        total += weights.abs().sum(0, dtype=torch.float64)
    return total * norms


def summed_scale_terms(
    x: Tensor, key_tokens: Tensor, value_tokens: Tensor, kept: Tensor, scale: float, activation: str
) -> tuple[float, float]:
    """(Σ ⟨D/p, D + R⟩, Σ ‖D/p‖²) over positions; their quotient, over all the data, is τ'/τ.

    x [positions, d_in], keys [n, d_in], values [n, d_out].  `kept`: the rows that stay, int64 [n_new], ascending.
    ArgumentError when they do not fit together.
    """
    check_pattention(x, key_tokens, value_tokens, scale, activation)
    check_kept("kept", kept, key_tokens.shape[0])
    stays = torch.zeros(key_tokens.shape[0], dtype=torch.bool)
    stays[kept] = True
    above, below = 0.0, 0.0
    function = score_function(activation)
    for scores in _scores(x, key_tokens):
        r, weights = function.statistic_and_weights(scores, scale)
        answers, energies = function.response(scores, r, scale), function.energies(scores, r)
        lost = weights[:, ~stays] @ value_tokens[~stays]
        answer = (answers[:, stays] @ value_tokens[stays]).double()
        share = _share(energies[:, stays], energies[:, ~stays]).pow(function.normaliser_power)
        answer_now = torch.where(share > 0, answer / share, 0)
        above += float((answer_now * (answer + lost)).sum())
        below += float((answer_now * answer_now).sum())
    return above, below


def largest(contributions: Tensor, count: int) -> Tensor:
    """The rows of the `count` largest of [n] contributions: [count], ascending. Of equal ones the lower row stays."""
    check_whole_number("count", count, 1, len(contributions))
    return contributions.sort(descending=True, stable=True).indices[:count].sort().values


def check_kept(name: str, rows: Tensor, tokens: int | None = None) -> None:
    """ArgumentError unless `rows` are distinct int64 row numbers, ascending, below `tokens` if that is given."""
    if rows.dim() != 1 or not len(rows) or rows.dtype != torch.int64 or (rows.diff() <= 0).any() or rows[0] < 0:
        raise ArgumentError(f"{name}: the rows that stay must be int64 [1 or more], ascending, from 0 on.")
    if tokens is not None and rows[-1] >= tokens:
        raise ArgumentError(f"{name}: names row {int(rows[-1])}, but there are {tokens} tokens.")


def _scores(x: Tensor, key_tokens: Tensor) -> Iterator[Tensor]:
    """A = X Kᵀ, for at most SCORE_ELEMENTS scores at a time."""
    for part in x.split(max(1, SCORE_ELEMENTS // key_tokens.shape[0])):
        yield part @ key_tokens.mT


def _share(kept: Tensor, dropped: Tensor) -> Tensor:
    """q [positions, 1], fp64: exactly 1 where all dropped energies are 0, and 0 where all kept ones are."""
    held, lost = (part.sum(-1, keepdim=True, dtype=torch.float64) for part in (kept, dropped))
    return torch.where(held > 0, held / (held + lost), 0)
