"""Matrix products of factors that are rounded to 8 bits: e4m3 for values, e5m2 for gradients.

    LR ≈ Q(L) Q(R)

rounding.py says what Q is. Each factor has one scale, a power of two. There is no history, so nothing has to be saved
or exchanged between ranks: a rank's shard, a micro batch or a part of the rows is rounded as the whole tensor would be.

`row_factors` scales the rows of a Pattention's x so that their scores are equally large, and one scale suits all of
them. For S = GELU(u) that scale needs no pass over S. Rows u have the norm τ, so no element is larger; but r and the
products are rounded, so the scale has room for twice τ. Then a typical element, τ/√n, is at least 112/√n in 8 bits. For
any n up to 50 million that is above 2⁻⁶, from which on e4m3 has all its digits.

| tensor | type | row by row for | column by column for | scale from |
|---|---|---|---|---|
| x [rows, d] | e4m3 | A = xKᵀ | dK = dAᵀx | x |
| K [n, d] | e4m3 | A = xKᵀ | dx = dA K | K |
| S [rows, n] | e4m3 | out = SV | dV = SᵀdO | τ |
| V [n, d] | e4m3 | dS = dO Vᵀ | out = SV | V |
| dO [rows, d] | e5m2 | dS = dO Vᵀ | dV = SᵀdO | dO |
| dA [rows, n] | e5m2 | dx = dA K | dK = dAᵀx | dA; with kernels a bound, see rounded_scores.py |

On GPUs, which need compute capability 8.9, torch's `scaled_mm` computes these products. On CPUs the rounded factors are
multiplied in fp32, with the same result except for the order of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.activations.function import ScoreFunction
from megatron_tf.model import rounded_scores
from megatron_tf.model.kernels.operators import operator, register_fake
from megatron_tf.model.kernels.score_layout import ALIGNMENT, empty_scores
from megatron_tf.model.products import Factor, Gradient
from megatron_tf.model.rounding import LARGEST_EXPONENT, Rounded, power_of_two, rounded


class Fp8Product:
    """A `products.Product` of factors in 8 bits; the result has the type of the left matrix."""

    def __call__(self, left: Factor, right: Factor, gradient: Gradient = None, out: Tensor | None = None) -> Tensor:
        made = _multiplied(left, right, gradient)
        return made if out is None else out.copy_(made)

    def scores(self, left: Factor, right: Factor, gradient: Gradient = None) -> Tensor:
        made = _multiplied(left, right, gradient)
        # torch's product has padded rows, as scores have
        is_aligned = made.stride(0) % ALIGNMENT == 0
        return made if is_aligned else empty_scores(made, *made.shape).copy_(made)

    def factor(self, x: Tensor, *, gradient: bool = False, bound: float | None = None, both: bool = False) -> Factor:
        return rounded(x, gradient=gradient, bound=bound, by_column=both)

    def weights(self, function: ScoreFunction, scores: Tensor, r: Tensor, scale: float) -> Factor:
        if self.rounds_scores(function, scores):
            return rounded_scores.weights(scores, r, scale)
        return self.factor(function.weights(scores, r, scale), bound=scale)

    def rounds_scores(self, function: ScoreFunction, scores: Tensor) -> bool:
        return rounded_scores.usable(function, scores)


PRODUCT = Fp8Product()


def emulated_product(left: Factor, right: Factor, gradient: Gradient = None) -> Tensor:
    """The product of the rounded factors, computed in at least fp32."""
    a, b = _factors(left, right, gradient)
    return (a.values() @ b.values()).to(a.dtype)


def scaled_product(left: Factor, right: Factor, gradient: Gradient = None) -> Tensor:
    """torch's product of 8-bit factors. It needs both with the summed dim contiguous, and sizes padded with zeros."""
    a, b = _factors(left, right, gradient)
    assert a.by_row is not None and b.by_column is not None
    return product_of_codes(a.by_row, b.by_column, a.down, b.down, a.dtype)[: a.shape[0], : b.shape[1]]


@operator()
def product_of_codes(left: Tensor, right: Tensor, left_down: Tensor, right_down: Tensor, dtype: torch.dtype) -> Tensor:
    """`left` [m, k] times the transpose of `right` [n, k], in 8 bits, and their scales: [m, n]. An operator because
    torch.compile of torch 2.11 cannot trace `scaled_mm`."""
    by_tensor = F.ScalingType.TensorWise
    return F.scaled_mm(left, right.mT, left_down, by_tensor, right_down, by_tensor, output_dtype=dtype)


register_fake(
    "product_of_codes",
    lambda left, right, left_down, right_down, dtype: left.new_empty(left.shape[0], right.shape[0], dtype=dtype),
)


def row_factors(norms: Tensor, scales: Sequence[float]) -> Tensor:
    """Powers of two c [..., 1], near τ/r averaged over projections with norms r [..., projections] and `scales` τ.

    It is 1 where all r are 0. A Pattention of cx with norms cr has the same output as one of x with r, and its scores
    have a root mean square of about τ/√n in each row.
    """
    scale = torch.tensor(scales, dtype=norms.dtype, device=norms.device)
    exponents = torch.where(norms > 0, (scale / norms).log2(), 0).mean(-1, keepdim=True)
    return power_of_two(exponents.round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).int())


def _multiplied(left: Factor, right: Factor, gradient: Gradient) -> Tensor:
    device = left.down.device if isinstance(left, Rounded) else left.device
    return (scaled_product if device.type == "cuda" else emulated_product)(left, right, gradient)


def _factors(left: Factor, right: Factor, gradient: Gradient) -> tuple[Rounded, Rounded]:
    """Both in 8 bits, the left one row by row and the right one column by column."""
    if not isinstance(left, Rounded):
        left = rounded(left, gradient=gradient == "left")
    if not isinstance(right, Rounded):
        right = rounded(right, gradient=gradient == "right", by_row=False, by_column=True)
    return left, right
