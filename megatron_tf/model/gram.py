"""The norm of a row of scores without the scores, for activations of τA/‖A‖₂.

    r² = ‖x Kᵀ‖² = x G xᵀ,   G = KᵀK

| tensor | shape on a rank |
|---|---|
| x | [rows, d], whole |
| K | [n/T, d] |
| G | [projections, d, d], fp32, summed over the tokens of all ranks |
| r | [rows, projections], fp32 |

So r is known before the first product, and over tensor ranks no row waits for an exchange, forward or backward. Under
sequence parallelism a rank makes r of its own rows [rows/T, d] before they are gathered.
Backward, with w = dr/r and what the layer says of dr (its T is ΣD∘A, and dr = −T/r):

    dx = w (x G),   dG = ½ xᵀ(w x),   dK = K (dG + dGᵀ)

All are linear in dr. So each rank takes the part of dr that its own tokens give: dx is summed over the ranks with that
of the products, and dG by itself, once for a micro batch. (Of its own rows a rank has the whole dr, and dG is summed
over the ranks alike.) Together this is the direct form's (D − A T/r²) K, because A
K = x G.

Saved for backward are x, K, G and r. xG is made again there, within one product of all projections.

x G xᵀ loses digits where x lies near the null space of K: rounding of the largest terms is what remains of r². No row
has a smaller r than that rounding, so none becomes large by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.activations.function import accumulating
from megatron_tf.parallel.collectives import copy_to, reduce_from
from megatron_tf.parallel.groups import Group

# Of what r² is for an average direction of x. Below it, more than three of fp32's seven digits may be lost.
DOUBTFUL = 2.0**-10
NOISE = 8  # roundings of the largest term of r²


def matrices(keys: Sequence[Tensor], group: Group) -> Tensor:
    """G of projections with keys [n_i/T, d]: [projections, d, d], the same on all ranks. Differentiable."""
    own = torch.stack([_Matrix.apply(k) for k in keys])
    return copy_to(reduce_from(own, group), group)


def norms(x: Tensor, matrices: Tensor) -> Tensor:
    """r of x [rows, d] for each of G [projections, d, d]: [rows, projections]. Differentiable in both."""
    return _Norms.apply(x, matrices)


def loses_digits(x: Tensor, matrices: Tensor, norms: Tensor) -> bool:
    """Whether some row of x has an r that is small against ‖x‖‖K‖. A GPU is waited for."""
    average = _largest(x.detach(), matrices.detach()) / x.shape[-1]
    return bool((norms.detach().square() < DOUBTFUL * average).any())


class _Matrix(Function):
    """KᵀK of this rank's keys. Its gradient takes one product, where autograd would take two."""

    @staticmethod
    def forward(ctx, keys):
        ctx.save_for_backward(keys)
        return (keys.mT @ keys).to(accumulating(keys))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (keys,) = ctx.saved_tensors
        return keys @ (gradient + gradient.mT).to(keys.dtype)


class _Norms(Function):
    @staticmethod
    def forward(ctx, x, matrices):
        columns = matrices.to(x.dtype).movedim(0, 1).flatten(1)
        products = (x @ columns).unflatten(-1, (matrices.shape[0], -1))
        squares = (products.to(matrices.dtype) * x[:, None]).sum(-1)
        noise = NOISE * torch.finfo(matrices.dtype).eps * _largest(x, matrices)
        norms = squares.maximum(noise).sqrt()
        ctx.save_for_backward(x, matrices, norms)
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, matrices, norms = ctx.saved_tensors
        weights = torch.where(norms > 0, gradient / norms, 0).to(x.dtype)
        weighted = (weights[..., None] * x[:, None]).flatten(1)  # [rows, projections · d]
        d_x = weighted @ matrices.to(x.dtype).flatten(0, 1)
        d_matrices = (x.mT @ weighted).unflatten(-1, (matrices.shape[0], -1)).movedim(1, 0)
        return d_x, d_matrices.to(matrices.dtype) / 2


def _largest(x: Tensor, matrices: Tensor) -> Tensor:
    """‖x‖²‖K‖², which no r² exceeds, [rows, projections]."""
    keys = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=matrices.dtype).square() * keys
