"""The passes over scores of `l2_norm_gelu` in fp8, whose results are wanted in 8 bits only, by kernels on GPUs.

| | reads | writes, in 8 bits |
|---|---|---|
| forward | A | S row by row |
| backward | A, dS | S column by column, D in both ways |

That needs scales before S and D are there. No element of S is larger than τ. For D, by Hölder's inequality,

    |D_ij| ≤ τ/r_i · GELU' · |dO_i · v_j| ≤ 1.13 · maxᵢ(‖dO_i‖₁ τ/r_i) · max|V|

The bound takes a pass over dO and V, which are narrow, instead of one over D. It may be some hundred times larger than
D's largest element: e5m2 has all its digits down to 2⁻²⁹ of its largest number, so what is then rounded more coarsely
is less than 2⁻²⁰ of D's largest element. Nothing is squared, so the bound overflows only if D nearly does.

Elsewhere PyTorch's passes or those of kernels/fused_passes.py make S and D in their type, and `rounding.rounded` rounds
them; results differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tf.activations import l2_norm_gelu
from megatron_tf.activations.function import ScoreFunction
from megatron_tf.activations.l2_norm import inverse
from megatron_tf.model import rounding
from megatron_tf.model.kernels.operators import operator, register_fake
from megatron_tf.model.products import Factor, Product
from megatron_tf.model.rounding import GRADIENTS, VALUES, Rounded, aligned, known_power

# GELU' is at most 1.13, and the product of rounded factors up to (1 + 2⁻³)(1 + 2⁻⁴) times as large.
MARGIN = 1.5
STRETCH = 512  # columns whose part of T one program adds up


class Gradient(NamedTuple):
    """Memory for D of all projections in e5m2, and its scale.

    `by_row` [m', columns'], empty if it is not wanted; `by_column` [columns', m'].
    `bound`: of its elements, as the bits of an fp32 number.
    """

    by_row: Tensor
    by_column: Tensor
    down: Tensor
    bound: Tensor

    def rounded(self, shape: tuple[int, int], dtype: torch.dtype) -> Rounded:
        by_row = self.by_row.view(GRADIENTS) if self.by_row.numel() else None
        return Rounded(by_row, self.by_column.view(GRADIENTS), self.down, shape, dtype)


def usable(function: ScoreFunction, scores: Tensor) -> bool:
    return isinstance(function, l2_norm_gelu.L2NormGelu) and rounding.usable(scores)


def weights(scores: Tensor, r: Tensor, scale: float) -> Rounded:
    """S of scores [m, n] and norms [m, 1], row by row."""
    by_row, down = rounded_weights(scores, r, scale, known_power(scale, gradient=False))
    return Rounded(by_row.view(VALUES), None, down, _shape(scores), scores.dtype)


def to_scores(
    scores: Tensor,
    parts: Sequence[Tensor],
    outputs: Sequence[Tensor],
    values: Sequence[Tensor],
    norms: Sequence[Tensor],
    scales: Sequence[float],
    product: Product,
    by_row: bool,
    of_values: Callable[[Factor, Factor], None],
) -> tuple[Rounded, Sequence[Tensor]]:
    """(dA of all projections, T of each).

    `scores`: of all projections, and `parts` those of each.  `outputs`: gradients of the outputs.  `by_row`: whether dA
    is wanted so as well.  `of_values`: is given Sᵀ of each projection, and its output's gradient.
    """
    into = empty_gradient(scores, outputs, values, norms, scales, by_row)
    totals: list[Tensor] = []
    start = 0
    for a, output, v, r, scale in zip(parts, outputs, values, norms, scales):
        grad = product.factor(output, gradient=True, both=True)
        s, total = backward(a, r, product.scores(grad, v.mT, "left"), scale, into, start)
        totals.append(total)
        of_values(s.mT, grad)
        start += aligned(a.shape[1])
    return into.rounded(_shape(scores), scores.dtype), totals


def empty_gradient(
    scores: Tensor,
    outputs: Sequence[Tensor],
    values: Sequence[Tensor],
    norms: Sequence[Tensor],
    scales: Sequence[float],
    by_row: bool,
) -> Gradient:
    """For scores [m, columns] of all projections, from their outputs' gradients, value tokens, norms and τ."""
    bounds = [
        (_sums(grad) * inverse(r, scale)).amax() * torch.linalg.vector_norm(v, ord=float("inf"))
        for grad, v, r, scale in zip(outputs, values, norms, scales)
    ]
    bound = (MARGIN * torch.stack(bounds).amax()).float()
    rows, columns = map(aligned, scores.shape)
    return Gradient(
        scores.new_empty((rows, columns) if by_row else (0, 0), dtype=torch.uint8),
        scores.new_empty((columns, rows), dtype=torch.uint8),
        scores.new_empty((), dtype=torch.float32),
        bound.view(torch.int32) & 0x7FFFFFFF,
    )


def backward(
    scores: Tensor, r: Tensor, gradient: Tensor, scale: float, into: Gradient, start: int
) -> tuple[Rounded, Tensor]:
    """(S column by column, T [m, 1]) of a projection's scores, from dS.

    D goes into the columns of `into` from `start` on, with zeros up to the next projection's.
    """
    stop = start + aligned(scores.shape[1])
    by_row = into.by_row[:, start:stop] if into.by_row.numel() else into.by_row
    by_column, down, totals = rounded_backward(
        scores, r, gradient, scale, known_power(scale, gradient=False), into.bound, by_row, into.by_column[start:stop],
        into.down,
    )  # fmt: skip
    made = Rounded(None, by_column.view(VALUES), down, _shape(scores), scores.dtype)
    return made, totals.sum(-1, keepdim=True)


@cache
def _kernels() -> ModuleType:
    from megatron_tf.model.kernels import triton_rounded_scores

    return triton_rounded_scores


@operator()
def rounded_weights(scores: Tensor, norms: Tensor, scale: float, power: int) -> tuple[Tensor, Tensor]:
    """2ᵏ S and 2⁻ᵏ; k is `power`."""
    out = _empty_weights(scores)
    _kernels().weights(scores, norms, scale, power, *out)
    return out


@operator(["by_row", "by_column", "down"])
def rounded_backward(
    scores: Tensor,
    norms: Tensor,
    gradient: Tensor,
    scale: float,
    power: int,
    bound: Tensor,
    by_row: Tensor,
    by_column: Tensor,
    down: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(2ᵏ Sᵀ, 2⁻ᵏ, parts of T); writes D, see `Gradient`."""
    made = _empty_backward(scores)
    transposed, weights_down, totals = made
    _kernels().backward(
        scores, norms, gradient, scale, power, transposed, weights_down, bound, by_row if by_row.numel() else None,
        by_column, down, totals, STRETCH,
    )  # fmt: skip
    return made


# Memory for the results. torch.compile calls these with all arguments of the operators.
def _empty_weights(scores: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    rows, columns = map(aligned, scores.shape)
    return scores.new_empty(rows, columns, dtype=torch.uint8), scores.new_empty((), dtype=torch.float32)


def _empty_backward(scores: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = map(aligned, scores.shape)
    return (
        scores.new_empty(columns, rows, dtype=torch.uint8),
        scores.new_empty((), dtype=torch.float32),
        scores.new_empty(scores.shape[0], -(-columns // STRETCH), dtype=torch.float32),
    )


register_fake("rounded_weights", _empty_weights)
register_fake("rounded_backward", _empty_backward)


def _sums(x: Tensor) -> Tensor:
    """Of the magnitudes in a row, in fp32: [m, 1]."""
    return torch.linalg.vector_norm(x, ord=1, dim=-1, keepdim=True, dtype=torch.float32)


def _shape(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]
