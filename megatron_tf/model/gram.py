"""The norm of a row of scores without the scores, for activations that are functions of τA/‖A‖₂.

    r² = ‖x Kᵀ‖² = x G xᵀ,   G = KᵀK

| tensor | shape on a rank |
|---|---|
| x | [rows, d], whole |
| K | [n/T, d] |
| G | [projections, d, d], fp32, summed over the tokens of all ranks |
| r | [rows, projections], fp32 |

So r is known before the first product, and with several tensor ranks no row waits for an exchange, forward or backward.
Under sequence parallelism a rank computes r of its own rows [rows/T, d] before they are gathered.
Backward, dr comes from the layer: its T is ΣD∘A, and dr = −T/r. With w = dr/r:

    dx = w (x G),   dG = ½ xᵀ(w x),   dK = K (dG + dGᵀ)

All are linear in dr. So each rank uses the part of dr that comes from its own tokens: its dx is summed over the ranks
together with that of the products, and its dG by itself. (For its own rows under sequence parallelism, a rank has the
whole dr, and dG is summed over the ranks as well.) In total this is the term −A T/r² K of the direct form, because
A K = x G.

G is the same for all micro batches of a step, and dK is linear in dG. So an engine has G computed in the first forward
pass of a step, dG summed up, and dK computed in the last backward pass. That is two products of 2 n d²/T operations and
two all-reduces of d² numbers a step instead of a micro batch, and in a pipeline one G in memory for all micro batches
in flight. A compiled block computes them for each micro batch, because its graph cannot contain work done only once.

Saved for backward are x, K, G and r. There xG is computed again, in one product for all projections.

x G xᵀ loses digits where x lies near the null space of K: of r² only the rounding error of its largest terms remains.
With ε the rounding of x's type, and r² as a share θ of that of an average direction of x, r is wrong by up to ε/θ in
16 bits, because G and xG are rounded to them: measured in bf16, at most 0.8 ε/θ for spectra of K with condition numbers
from 10 to 1,000. In a trained model θ was at least 0.56, and r as exact as that of rounded scores. r is never smaller
than the error, so that no row becomes large through a division by r.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.activations.function import accumulating
from megatron_tf.model.products import multiply
from megatron_tf.parallel.collectives import all_reduce, copy_to, reduce_from
from megatron_tf.parallel.groups import Group

# Of r² as a share of that for an average direction of x. Below the first, more than three of fp32's seven digits may be
# lost; below so many roundings of a type of 16 bits, more than 3 % of r.
DOUBTFUL, DOUBTFUL_ROUNDINGS = 2.0**-10, 32
NOISE = 8  # the least r², in rounding errors of its largest term


class StepMatrices:
    """G of projections that share x, and the sum of dG, over the micro batches of a step.

    `begin` announces the number of micro batches. Each has one forward pass, apart from recomputation, and one backward
    pass, in any order. When none are left, `in_use` is False and `matrices` computes G for each call.
    """

    def __init__(self) -> None:
        self._to_come = 0
        self._matrices: Tensor | None = None
        self._gradient: Tensor | None = None

    def begin(self, micro_batches: int) -> None:
        """Starts a step of so many micro batches, and drops G and dG of the step before."""
        self._to_come, self._matrices, self._gradient = micro_batches, None, None

    @property
    def in_use(self) -> bool:
        return self._to_come > 0

    def made(self, keys: Sequence[Tensor], group: Group) -> Tensor:
        """G of these keys, computed at the first call of a step. Not differentiable."""
        if self._matrices is None:
            self._matrices = all_reduce(torch.stack([_matrix(k) for k in keys]), group)
        return self._matrices.detach()

    def whole_gradient(self, gradient: Tensor, group: Group) -> Tensor | None:
        """Adds dG of a micro batch. Returns that of the step over all ranks after the last micro batch, None before."""
        self._gradient = gradient if self._gradient is None else self._gradient.add_(gradient)
        self._to_come -= 1
        if self._to_come:
            return None
        whole = all_reduce(self._gradient, group)
        self.begin(0)
        return whole


def matrices(keys: Sequence[Tensor], group: Group, step: StepMatrices | None = None) -> Tensor:
    """G of projections with keys [n_i/T, d]: [projections, d, d], the same on all ranks. Differentiable.

    `step`: keeps G over micro batches. It is not used on one process, where a call can still take the direct form, in a
    compiled graph, and without gradients.
    """
    kept = group.size > 1 and not torch.compiler.is_compiling() and torch.is_grad_enabled()
    if step is not None and kept and step.in_use:
        return _MatricesOfStep.apply(step, group, *keys)
    own = torch.stack([_Matrix.apply(k) for k in keys])
    return copy_to(reduce_from(own, group), group)


def norms(x: Tensor, matrices: Tensor) -> Tensor:
    """r of x [rows, d] for each G in `matrices` [projections, d, d]: [rows, projections]. Differentiable in both."""
    return _Norms.apply(x, matrices)


def loses_digits(x: Tensor, matrices: Tensor, norms: Tensor) -> bool:
    """Whether r of some row is so small against ‖x‖‖K‖ that it has lost digits. Synchronises with a GPU."""
    # `norms` are no smaller than their noise, which for a large width is above the other two
    least = max(DOUBTFUL, DOUBTFUL_ROUNDINGS * torch.finfo(x.dtype).eps, 2 * _noise(x, matrices))
    return bool((norms.detach().square() < least * _average(x.detach(), matrices.detach())).any())


class _Matrix(Function):
    """KᵀK of this rank's keys. Its gradient takes one product; autograd would take two."""

    @staticmethod
    def forward(ctx, keys):
        ctx.save_for_backward(keys)
        return _matrix(keys)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (keys,) = ctx.saved_tensors
        return _keys_gradient(keys, gradient)


class _MatricesOfStep(Function):
    """G of all micro batches of a step. Only the last backward pass gives keys a gradient, that of the whole step."""

    @staticmethod
    def forward(ctx, step, group, *keys):
        ctx.save_for_backward(*keys)
        ctx.step, ctx.group = step, group
        return step.made(keys, group)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        whole = ctx.step.whole_gradient(gradient, ctx.group)
        if whole is None:
            return (None,) * (2 + len(ctx.saved_tensors))
        return None, None, *map(_keys_gradient, ctx.saved_tensors, whole)


def _matrix(keys: Tensor) -> Tensor:
    return multiply(keys.mT, keys).to(accumulating(keys))


def _keys_gradient(keys: Tensor, gradient: Tensor) -> Tensor:
    return multiply(keys, (gradient + gradient.mT).to(keys.dtype))


class _Norms(Function):
    @staticmethod
    def forward(ctx, x, matrices):
        columns = matrices.to(x.dtype).movedim(0, 1).flatten(1)
        products = multiply(x, columns).unflatten(-1, (matrices.shape[0], -1))
        squares = (products.to(matrices.dtype) * x[:, None]).sum(-1)
        norms = squares.maximum(_noise(x, matrices) * _average(x, matrices)).sqrt()
        ctx.save_for_backward(x, matrices, norms)
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, matrices, norms = ctx.saved_tensors
        weights = torch.where(norms == 0, 0, gradient / norms).to(x.dtype)
        weighted = (weights[..., None] * x[:, None]).flatten(1)  # [rows, projections · d]
        d_x = multiply(weighted, matrices.to(x.dtype).flatten(0, 1))
        d_matrices = multiply(x.mT, weighted).unflatten(-1, (matrices.shape[0], -1)).movedim(1, 0)
        return d_x, d_matrices.to(matrices.dtype) / 2


def _average(x: Tensor, matrices: Tensor) -> Tensor:
    """r² of an average direction of x: ‖x‖²‖K‖²/d [rows, projections]. No r² is more than d times as large."""
    keys = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=matrices.dtype).square() * keys


def _noise(x: Tensor, matrices: Tensor) -> float:
    """The rounding error of r², as a share of `_average`: of its largest term, or in 16 bits of the sum of all."""
    return max(NOISE * x.shape[-1] * torch.finfo(matrices.dtype).eps, torch.finfo(x.dtype).eps)
