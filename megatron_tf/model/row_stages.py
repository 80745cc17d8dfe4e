"""What Pattention does between its products: the elementwise stages, row by row of the scores A [rows, n].

With Σ over a row, all of its tokens (sharded: the caller sums over the group between the stages):

| θ | r | S = θ(A) | D from dS | T | dA |
|---|---|---|---|---|---|
| `l2_norm_gelu` | √ΣA² | GELU(U), U = τA/r | τ/r · dS∘GELU'(U) | ΣD∘A | D − A·T/r² |
| `gelu_l2_norm` | √ΣG², G = GELU(A) | τG/r | τ/r · dS | ΣD∘G | (D − G·T/r²)∘GELU'(A) |
| `softmax` | log Σexp(A) | τ·exp(A − r) | dS | ΣD∘S | S∘(D − T/τ) |

D and then dA take the place of dS, so the backward needs no memory beside dS and S. `l2_norm_gelu` has kernels of its
own (fused_stages.py), which tests compare with what is written here.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.config.schema import Activation
from megatron_tf.model import fused_stages


def statistic(scores: Tensor, activation: Activation) -> Tensor:
    """r over the columns that are here, [rows, 1], at least fp32."""
    accumulate = torch.promote_types(scores.dtype, torch.float32)
    if activation == "softmax":
        return torch.logsumexp(scores.to(accumulate), -1, keepdim=True)
    if activation == "gelu_l2_norm":
        scores = F.gelu(scores)
    elif fused_stages.usable(scores):
        return fused_stages.norm(scores)
    return torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=accumulate)


def weights(scores: Tensor, r: Tensor, scale: float, activation: Activation) -> Tensor:
    """S, in the type of the scores."""
    if activation == "softmax":
        return ((scores.to(r.dtype) - r).exp() * scale).to(scores.dtype)
    if activation == "gelu_l2_norm":
        return F.gelu(scores) * _inverse(r, scale).to(scores.dtype)
    if fused_stages.usable(scores):
        return fused_stages.weights(scores, r, scale)
    return F.gelu(scores * _inverse(r, scale).to(scores.dtype))


def statistic_and_weights(scores: Tensor, scale: float, activation: Activation) -> tuple[Tensor, Tensor]:
    """(r, S) where the rows are whole."""
    if activation == "l2_norm_gelu" and fused_stages.usable(scores):
        return fused_stages.norm_and_weights(scores, scale)
    r = statistic(scores, activation)
    return r, weights(scores, r, scale, activation)


def backward(
    scores: Tensor, r: Tensor, gradient: Tensor, scale: float, activation: Activation
) -> tuple[Tensor, Tensor]:
    """(S, T [rows, 1]); `gradient` is dS and becomes D."""
    if activation == "l2_norm_gelu":
        if fused_stages.usable(scores):
            return fused_stages.backward(scores, r, gradient, scale)
        inverse = _inverse(r, scale).to(scores.dtype)
        normalised = scores * inverse
        torch.ops.aten.gelu_backward.grad_input(gradient, normalised, grad_input=gradient).mul_(inverse)
        s = torch.ops.aten.gelu_(normalised)
        return s, (gradient * scores).sum(-1, keepdim=True, dtype=r.dtype)
    s = weights(scores, r, scale, activation)
    total = (gradient * s).sum(-1, keepdim=True, dtype=r.dtype)  # with gelu_l2_norm of dS∘S, which is D∘G
    if activation == "gelu_l2_norm":
        gradient.mul_(_inverse(r, scale).to(scores.dtype))
    return s, total


def couple(scores: Tensor, r: Tensor, total: Tensor, gradient: Tensor, scale: float, activation: Activation) -> None:
    """`gradient` is D and becomes dA."""
    if activation == "softmax":
        gradient.sub_((total / scale).to(gradient.dtype)).mul_(weights(scores, r, scale, activation))
        return
    if activation == "l2_norm_gelu" and fused_stages.usable(scores):
        fused_stages.couple(scores, r, total, gradient)
        return
    coupling = torch.where(r > 0, total / r.square(), 0).to(scores.dtype)
    if activation == "gelu_l2_norm":
        gradient.addcmul_(F.gelu(scores), coupling, value=-1)
        torch.ops.aten.gelu_backward.grad_input(gradient, scores, grad_input=gradient)
    else:
        gradient.addcmul_(scores, coupling, value=-1)


def backward_and_couple(scores: Tensor, r: Tensor, gradient: Tensor, scale: float, activation: Activation) -> Tensor:
    """S, where the rows are whole; `gradient` is dS and becomes dA."""
    if activation == "l2_norm_gelu" and fused_stages.usable(scores):
        return fused_stages.backward_and_couple(scores, r, gradient, scale)
    s, total = backward(scores, r, gradient, scale, activation)
    couple(scores, r, total, gradient, scale, activation)
    return s


def _inverse(norm: Tensor, scale: float) -> Tensor:
    """τ/r, and 0 where the whole row is 0."""
    return torch.where(norm > 0, scale / norm, 0)
