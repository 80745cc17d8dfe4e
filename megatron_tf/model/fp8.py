"""Matrix products of factors that are rounded to 8 bits: e4m3 for values, e5m2 for gradients.

    LR ≈ Q(L) Q(R),   Q(X) = 2⁻ᵏ · round(2ᵏ X)

| type | digits | largest | smallest that keeps all digits |
|---|---|---|---|
| e4m3 | 4 bits | 448 | 2⁻⁶ |
| e5m2 | 3 bits | 57344 | 2⁻¹⁴ |

Each tensor has one k, the largest with which nothing overflows. It is found from the tensor itself. There is no
history, so nothing has to be saved or exchanged between ranks. A power of two does not change digits. So the rounding
of an element does not depend on the largest element of its tensor, unless it is less than 2⁻¹³ of that (e4m3; e5m2:
2⁻²⁸): a rank's shard, a micro batch or a part of the rows is rounded as the whole tensor would be.

`row_factors` scales the rows of a Pattention's x so that their scores are equally large, and one k suits all of them.

On GPUs, which need compute capability 8.9, torch's `scaled_mm` computes these products. On CPUs the rounded factors are
multiplied in fp32, with the same result except for the order of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.activations.function import accumulating
from megatron_tf.model.products import Gradient

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
ALIGNMENT = 16  # cuBLAS requires sizes to be multiples of it
_TYPES = {None: (VALUES, VALUES), "left": (GRADIENTS, VALUES), "right": (VALUES, GRADIENTS)}
# The largest number of either type is 1.75 times 2 to the power of this.
_EXPONENTS = {VALUES: 8, GRADIENTS: 15}
# fp32: bits of the mantissa, the exponent's offset, and the term that makes a mantissa above 1.75 carry over.
_MANTISSA_BITS, _BIAS, _CARRY = 23, 127, 0x1FFFFF
_LARGEST_EXPONENT = 126  # so that the power of two and its inverse are both normal numbers in fp32


def product(left: Tensor, right: Tensor, gradient: Gradient = None, out: Tensor | None = None) -> Tensor:
    """left [m, k] times right [k, n], both rounded to 8 bits -> [m, n] in the type of `left`: a `products.Product`."""
    multiply = scaled_product if left.is_cuda else emulated_product
    made = multiply(left, right, gradient)
    return made if out is None else out.copy_(made)


def emulated_product(left: Tensor, right: Tensor, gradient: Gradient = None) -> Tensor:
    """The product of the rounded factors, computed in at least fp32."""
    a, b = (_rounded(factor, kind) for factor, kind in zip((left, right), _TYPES[gradient]))
    return (a @ b).to(left.dtype)


def scaled_product(left: Tensor, right: Tensor, gradient: Gradient = None) -> Tensor:
    """torch's product of 8-bit factors. It needs both with the summed dim contiguous, and sizes padded with zeros."""
    of_left, of_right = _TYPES[gradient]
    a, down = quantised(_padded(left), of_left)
    b, right_down = quantised(_padded(right.mT), of_right)
    by_tensor = F.ScalingType.TensorWise
    made = F.scaled_mm(
        a.contiguous(), b.contiguous().mT, down, by_tensor, right_down, by_tensor, output_dtype=left.dtype
    )
    return made[: left.shape[0], : right.shape[1]]


def quantised(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """(2ᵏ x in the float8 type `kind`, 2⁻ᵏ in fp32). If an element of x is infinite or NaN, the second is NaN."""
    largest = torch.linalg.vector_norm(x, ord=float("inf"), dtype=accumulating(x)).float()
    # the exponent, and one more where the mantissa is larger than that of the type's largest number
    exponent = (largest.view(torch.int32) + _CARRY >> _MANTISSA_BITS) - _BIAS
    up = _power_of_two((_EXPONENTS[kind] - exponent).clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT))
    return (x * up).to(kind), up.reciprocal() + (largest - largest)


def row_factors(norms: Tensor, scales: Sequence[float]) -> Tensor:
    """Powers of two c [..., 1], near τ/r averaged over projections with norms r [..., projections] and `scales` τ.

    It is 1 where all r are 0. A Pattention of cx with norms cr has the same output as one of x with r, and its scores
    have a root mean square of about τ/√n in each row.
    """
    scale = torch.tensor(scales, dtype=norms.dtype, device=norms.device)
    exponents = torch.where(norms > 0, (scale / norms).log2(), 0).mean(-1, keepdim=True)
    return _power_of_two(exponents.round().clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).int())


def _rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    values, down = quantised(x, kind)
    return values.to(accumulating(x)) * down.to(accumulating(x))


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to the power of int32 numbers from −126 to 127, exactly, in fp32: made from its bits."""
    return (exponent + _BIAS << _MANTISSA_BITS).view(torch.float32)


def _padded(x: Tensor) -> Tensor:
    rows, columns = (-size % ALIGNMENT for size in x.shape)
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x
