"""Pattention: attention from the input to n learnable parameter tokens. The maths, once, for every layout.

    A = X Kᵀ,   S = θ(A),   out = S V

| θ | forward | r, one number a row | backward of the row coupling |
|---|---|---|---|
| `l2_norm_gelu` | U = τA/r, S = GELU(U) | √ΣA² | dU = dS∘GELU'(U);  dA = τ/r · (dU − U·Σ(dU∘U)/τ²) |
| `gelu_l2_norm` | G = GELU(A), S = τG/r | √ΣG² | dG = τ/r · (dS − S·Σ(dS∘S)/τ²);  dA = dG∘GELU'(A) |
| `softmax` | S = τ·exp(A − r) | log Σexp(A) | dA = S∘(dS − Σ(dS∘S)/τ) |

Sharded over a group T (token axis): each Σ runs over all tokens, so it is all-reduced over T. That is one
number a row and projection, forward and backward; everything else is local.

| tensor | local shape |
|---|---|
| X | [..., d_in], whole on every rank |
| K, V | [n/T, d_in], [n/T, d_out] |
| A, S | [..., n/T] |
| r, Σ | [..., 1 for each projection that shares X] |
| out | [..., d_out], partial: the caller sums it over T |

Projections that share X (query, key, value) go through one product against their concatenated keys and one
all-reduce. Saved for backward: X once, A in the compute type, and r; GELU and S are recomputed.
A row of scores that is all zero has r = 0: its output and gradients are 0, never NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron_tf.config.schema import Activation
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import SINGLE, Group
from megatron_tf.params import default_scale


def pattention(
    x: Tensor,
    key_tokens: Tensor,
    value_tokens: Tensor,
    *,
    scale: float | None = None,
    activation: Activation = "l2_norm_gelu",
) -> Tensor:
    """Pattention on one process. Differentiable in all three tensors.

    x [..., d_in], key_tokens [n, d_in], value_tokens [n, d_out] -> [..., d_out].
    `scale` is τ; the default is √n (n for softmax), right only for a model that was never grown.
    """
    if scale is None:
        scale = default_scale(key_tokens.shape[0], activation)
    return partial_pattention(x, [key_tokens], [value_tokens], [scale], activation, SINGLE)[0]


def partial_pattention(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[float],
    activation: Activation,
    group: Group,
) -> tuple[Tensor, ...]:
    """Outputs of several projections of one x, each still to be summed over `group`.

    x [..., d_in]; keys[i] [n_i/T, d_in]; values[i] [n_i/T, d_out] -> one [..., d_out] a projection.
    """
    return _Pattention.apply(x, activation, tuple(scales), group, *keys, *values)


@torch.no_grad()
def token_weights(
    x: Tensor, key_tokens: Tensor, scale: float, activation: Activation, group: Group
) -> tuple[Tensor, Tensor]:
    """(‖A‖₂ over all tokens [..., 1], this rank's S [..., n/T]) of one projection, to look at. Not differentiable."""
    scores = x @ key_tokens.mT
    statistic = _row_statistic(scores, [key_tokens], activation, group)
    norm = statistic if activation == "l2_norm_gelu" else _row_statistic(scores, [key_tokens], "l2_norm_gelu", group)
    return norm, _weights(scores, statistic, scale, activation)


class _Pattention(Function):
    @staticmethod
    def forward(ctx, x, activation, scales, group, *tokens):
        keys, values = tokens[: len(scales)], tokens[len(scales) :]
        scores = x @ _joined(keys).mT
        statistic = _row_statistic(scores, keys, activation, group)
        outputs = tuple(
            _weights(a, r, scale, activation) @ v
            for a, r, scale, v in zip(_split(scores, keys), statistic.split(1, -1), scales, values)
        )
        ctx.save_for_backward(x, scores, statistic, *tokens)
        ctx.activation, ctx.scales, ctx.group = activation, scales, group
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, scores, statistic, *tokens = ctx.saved_tensors
        activation, scales, group = ctx.activation, ctx.scales, ctx.group
        keys, values = tokens[: len(scales)], tokens[len(scales) :]
        rows, sums, value_grads = [], [], []
        for a, r, scale, v, grad in zip(_split(scores, keys), statistic.split(1, -1), scales, values, grads):
            s = _weights(a, r, scale, activation)
            value_grads.append(_outer(s, grad))
            d_s = grad @ v.mT
            if activation == "l2_norm_gelu":
                s = _normalised(a, r, scale)  # U takes the place of S from here on
                d_s = torch.ops.aten.gelu_backward(d_s, s)
            rows.append((d_s, s))
            sums.append((d_s * s).sum(-1, keepdim=True, dtype=statistic.dtype))
        coupling = all_reduce(torch.cat(sums, -1), group).split(1, -1)
        d_scores = torch.empty_like(scores)
        for out, a, r, scale, (d_s, s), total in zip(
            _split(d_scores, keys), _split(scores, keys), statistic.split(1, -1), scales, rows, coupling
        ):
            if activation == "softmax":
                out.copy_(s * (d_s - (total / scale).to(s.dtype)))
                continue
            d = (d_s - s * (total / scale**2).to(s.dtype)) * _inverse(r, scale).to(s.dtype)
            out.copy_(d if activation == "l2_norm_gelu" else torch.ops.aten.gelu_backward(d, a))
        d_x = d_scores @ _joined(keys) if ctx.needs_input_grad[0] else None
        key_grads = _outer(d_scores, x).split([k.shape[0] for k in keys])
        return d_x, None, None, None, *key_grads, *value_grads


def _joined(tokens: Sequence[Tensor]) -> Tensor:
    return tokens[0] if len(tokens) == 1 else torch.cat(tuple(tokens))


def _split(scores: Tensor, keys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Views of the projections' own columns."""
    return scores.split([k.shape[0] for k in keys], -1)


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Σ over rows of left ⊗ right: [..., m], [..., d] -> [m, d]."""
    return left.reshape(-1, left.shape[-1]).mT @ right.reshape(-1, right.shape[-1])


def _row_statistic(scores: Tensor, keys: Sequence[Tensor], activation: Activation, group: Group) -> Tensor:
    """r of every row and projection, over all tokens of the group: [..., projections], at least fp32."""
    accumulate = torch.promote_types(scores.dtype, torch.float32)
    parts = _split(scores, keys)
    if activation == "softmax":
        local = torch.cat([torch.logsumexp(a.to(accumulate), -1, keepdim=True) for a in parts], -1)
        top = all_reduce(local, group, dist.ReduceOp.MAX)
        return top + all_reduce((local - top).exp(), group).log()
    if activation == "gelu_l2_norm":
        parts = tuple(F.gelu(a) for a in parts)
    norms = [torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=accumulate) for a in parts]
    local = torch.cat(norms, -1)
    return local if group.size == 1 else all_reduce(local.square(), group).sqrt()


def _inverse(norm: Tensor, scale: float) -> Tensor:
    """τ/r, and 0 where the whole row is 0."""
    return torch.where(norm > 0, scale / norm, 0)


def _normalised(a: Tensor, norm: Tensor, scale: float) -> Tensor:
    return a * _inverse(norm, scale).to(a.dtype)


def _weights(a: Tensor, statistic: Tensor, scale: float, activation: Activation) -> Tensor:
    """S, in the type of the scores."""
    if activation == "softmax":
        return ((a.to(statistic.dtype) - statistic).exp() * scale).to(a.dtype)
    if activation == "gelu_l2_norm":
        return _normalised(F.gelu(a), statistic, scale)
    return F.gelu(_normalised(a, statistic, scale))
