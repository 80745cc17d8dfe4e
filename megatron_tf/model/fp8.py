"""Matrix products of factors that are rounded to 8 bits: e4m3 for values, e5m2 for gradients.

    LR ≈ Q(L) Q(R),   Q(X) = 2⁻ᵏ · round(2ᵏ X)

| type | digits | largest | smallest that keeps all digits |
|---|---|---|---|
| e4m3 | 4 bits | 448 | 2⁻⁶ |
| e5m2 | 3 bits | 57344 | 2⁻¹⁴ |

k is one number a tensor, the largest with which nothing overflows, found from the tensor itself: nothing is
remembered, so there is nothing to save or to agree on. A power of two changes no digits. So what an element is rounded
to does not depend on its tensor's largest, unless it is less than 2⁻¹³ of that (e4m3; e5m2: 2⁻²⁸): a rank's shard, a
micro batch or a part of the rows has the digits that the whole would have.

Of the rows of a Pattention's x, `row_factors` makes the scores equally large, so that one k does for all of them.

GPUs with such products (from compute capability 8.9) make them by torch's `scaled_mm`. Elsewhere the rounded factors
are multiplied in fp32, which is the same but for the order of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.activations.function import accumulating
from megatron_tf.model.products import Gradient

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNMENT = 16  # of which cuBLAS wants the sizes to be multiples
_TYPES = {None: (VALUES, VALUES), "left": (GRADIENTS, VALUES), "right": (VALUES, GRADIENTS)}
# Both types' largest number is 1.75 times a power of two, this one.
_EXPONENTS = {VALUES: 8, GRADIENTS: 15}
# Numbers in fp32: bits behind the exponent, what is added to the exponent, and what makes a mantissa above 1.75 carry.
_MANTISSA_BITS, _BIAS, _CARRY = 23, 127, 0x1FFFFF
_LARGEST_EXPONENT = 126  # of a power of two whose inverse has all digits in fp32


def product(left: Tensor, right: Tensor, gradient: Gradient = None, out: Tensor | None = None) -> Tensor:
    """A `products.Product` [m, k] × [k, n] -> [m, n], in the type of the factors."""
    multiply = scaled_product if left.is_cuda else emulated_product
    made = multiply(left, right, gradient)
    return made if out is None else out.copy_(made)


def emulated_product(left: Tensor, right: Tensor, gradient: Gradient = None) -> Tensor:
    """Of the rounded factors, in at least fp32."""
    a, b = (_rounded(factor, kind) for factor, kind in zip((left, right), _TYPES[gradient]))
    return (a @ b).to(left.dtype)


def scaled_product(left: Tensor, right: Tensor, gradient: Gradient = None) -> Tensor:
    """By torch's product of 8-bit factors, which wants both with the summed axis last, and sizes padded with zeros."""
    of_left, of_right = _TYPES[gradient]
    a, down = quantised(_padded(left), of_left)
    b, right_down = quantised(_padded(right.mT), of_right)
    by_tensor = F.ScalingType.TensorWise
    made = F.scaled_mm(
        a.contiguous(), b.contiguous().mT, down, by_tensor, right_down, by_tensor, output_dtype=left.dtype
    )
    return made[: left.shape[0], : right.shape[1]]


def quantised(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """(2ᵏ x in a float8 type, 2⁻ᵏ in fp32). Where something in x is infinite or NaN, the second is NaN."""
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dtype=accumulating(x)).float()
    # the exponent, and one more where the mantissa is larger than that of the type's largest number
    exponent = (largest.view(torch.int32) + _CARRY >> _MANTISSA_BITS) - _BIAS
    up = _power_of_two((_EXPONENTS[kind] - exponent).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT))
    return (x * up).to(kind), up.reciprocal() + (largest - largest)


def row_factors(norms: Tensor, scales: Sequence[float]) -> Tensor:
    """Powers of two [..., 1] near τ/r, over norms r [..., projections] whose scales are τ; 1 where r is 0.

    With cx and cr for x and r a Pattention is the same, and its scores have a root mean square of about τ/√n in each
    row.
    """
    scale = torch.tensor(scales, dtype=norms.dtype, device=norms.device)
    exponents = torch.where(norms > 0, (scale / norms).log2(), 0).mean(-1, keepdim=True)
    return _power_of_two(exponents.round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).int())


def _rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    values, down = quantised(x, kind)
    return values.to(accumulating(x)) * down.to(accumulating(x))


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to the power of whole numbers from −126 to 127, exactly, in fp32: by its bits."""
    return (exponent + _BIAS << _MANTISSA_BITS).view(torch.float32)


def _padded(x: Tensor) -> Tensor:
    rows, columns = (-size % ALIGNMENT for size in x.shape)
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x
