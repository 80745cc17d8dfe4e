"""Matrices rounded to 8 bits, with one scale: e4m3 for values, e5m2 for gradients.

    Q(X) = 2⁻ᵏ · round(2ᵏ X)

| type | digits | largest | smallest that keeps all digits |
|---|---|---|---|
| e4m3 | 4 bits | 448 | 2⁻⁶ |
| e5m2 | 3 bits | 57344 | 2⁻¹⁴ |

k is the largest with which nothing overflows. It is found from the matrix itself, in a pass over it, or from a bound of
its elements that is known without one. A power of two does not change digits. So the rounding of an element does not
depend on k, unless 2ᵏ x is smaller than the last column of the table: a bound may be far too large. There is room for
twice the bound, and what is larger becomes the type's largest number.

Products want the numbers of one factor row by row and those of the other column by column, and a backward pass wants
some matrices in both ways: they are rounded once.

On GPUs from compute capability 8.9 on the passes are kernels of kernels/triton_rounding.py. Elsewhere they are
PyTorch's, with the same result in every bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.activations.function import accumulating
from megatron_tf.compiling import constant_when_compiled
from megatron_tf.model.kernels.operators import operator, register_fake
from megatron_tf.native import can_run_triton

VALUES, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2
CAPABILITY = (8, 9)  # of GPUs, from which on they convert to these types and multiply in them
ALIGNMENT = 16  # cuBLAS requires sizes to be multiples of it
# The largest number of either type, and the power of two that it is 1.75 times.
_LARGEST = {VALUES: 448.0, GRADIENTS: 57344.0}
_EXPONENTS = {VALUES: 8, GRADIENTS: 15}
# fp32: bits of the mantissa, the exponent's offset, the term that makes a mantissa above 1.75 carry over, all bits but
# the sign, infinity.
_MANTISSA_BITS, _BIAS, _CARRY, _SIGN, _INFINITY = 23, 127, 0x1FFFFF, 0x7FFFFFFF, 0x7F800000
LARGEST_EXPONENT = 126  # so that the power of two and its inverse are both normal numbers in fp32


class Rounded(NamedTuple):
    """A matrix X [m, n] in 8 bits.

    `by_row`: 2ᵏ X [m', n'], and `by_column`: its transpose [n', m'], both contiguous and padded with zeros to multiples
        of ALIGNMENT; None: not made.
    `down`: 2⁻ᵏ in fp32; NaN if k was found from X and an element of it is infinite or NaN.
    `shape`: (m, n).  `dtype`: the type of X.
    """

    by_row: Tensor | None
    by_column: Tensor | None
    down: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def mT(self) -> Rounded:
        return Rounded(self.by_column, self.by_row, self.down, (self.shape[1], self.shape[0]), self.dtype)

    def split(self, sizes: Sequence[int], dim: int) -> tuple[Rounded, ...]:
        """Parts of the columns, in the layout by column. Each begins at a multiple of ALIGNMENT, with zeros before it.

        `dim`: -1.
        """
        assert dim == -1 and self.by_column is not None
        starts = [sum(sizes[:part]) for part in range(len(sizes))]
        return tuple(
            Rounded(None, self.by_column[start : start + aligned(size)], self.down, (self.shape[0], size), self.dtype)
            for start, size in zip(starts, sizes)
        )

    def values(self) -> Tensor:
        """Q(X), in at least fp32."""
        if self.by_row is None:
            return self.mT.values().mT
        wide = torch.promote_types(self.dtype, torch.float32)
        return self.by_row[: self.shape[0], : self.shape[1]].to(wide) * self.down.to(wide)


def rounded(
    x: Tensor, *, gradient: bool = False, bound: float | None = None, by_row: bool = True, by_column: bool = False
) -> Rounded:
    """x [m, n] in 8 bits, in the layouts that are asked for.

    `bound`: no element of x is larger, but perhaps by rounding; None: they are looked through.
    """
    if x.stride(1) != 1 and x.stride(0) == 1:
        return rounded(x.mT, gradient=gradient, bound=bound, by_row=by_column, by_column=by_row).mT
    if x.stride(1) != 1:
        x = x.contiguous()
    find, make = (largest_bits, round_to_8_bits) if usable(x) else (portable_largest, portable_rounded)
    kind = GRADIENTS if gradient else VALUES
    top, power = (find(x), 0) if bound is None else (None, known_power(bound, gradient))
    rows, columns, down = make(x, top, power, gradient, by_row, by_column)
    shape = x.shape[0], x.shape[1]
    return Rounded(rows.view(kind) if by_row else None, columns.view(kind) if by_column else None, down, shape, x.dtype)


def power_of_two(exponent: Tensor) -> Tensor:
    """2 to the power of int32 numbers from −126 to 127, exactly, in fp32: made from its bits."""
    return (exponent + _BIAS << _MANTISSA_BITS).view(torch.float32)


def known_power(bound: float, gradient: bool) -> int:
    """k with which twice the bound does not overflow."""
    most = _LARGEST[GRADIENTS if gradient else VALUES]
    return max(-LARGEST_EXPONENT, min(LARGEST_EXPONENT, math.floor(math.log2(most / (2 * bound)))))


def usable(x: Tensor) -> bool:
    """Whether the kernels can round such a matrix."""
    return x.is_cuda and _has_kernels(x.device.index or 0, x.dtype)


@constant_when_compiled
def _has_kernels(device: int, dtype: torch.dtype) -> bool:
    if not can_run_triton("cuda"):
        return False
    return dtype in _kernels().SUPPORTED_DTYPES and torch.cuda.get_device_capability(device) >= CAPABILITY


@cache
def _kernels() -> ModuleType:
    from megatron_tf.model.kernels import triton_rounding

    return triton_rounding


def portable_largest(x: Tensor) -> Tensor:
    """The largest magnitude of x [m, n], as the bits of an fp32 number: int32 []."""
    found = torch.linalg.vector_norm(x, ord=float("inf"), dtype=accumulating(x)).float()
    return found.view(torch.int32) & _SIGN


def portable_rounded(
    x: Tensor, largest: Tensor | None, power: int, gradient: bool, by_row: bool, by_column: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(`by_row`, `by_column`, `down`) of `Rounded`; numbers are uint8, and empty where they are not wanted.

    `largest`: the result of `portable_largest`; None: k is `power`.
    """
    kind, wide = GRADIENTS if gradient else VALUES, accumulating(x)
    if largest is None:
        k = torch.full((), power, dtype=torch.int32, device=x.device)
        down = power_of_two(-k)
    else:
        # the exponent, and one more where the mantissa is larger than that of the type's largest number
        exponent = (largest.clamp(max=_INFINITY) + _CARRY >> _MANTISSA_BITS) - _BIAS
        k = (_EXPONENTS[kind] - exponent).clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)
        down = torch.where(largest < _INFINITY, power_of_two(-k), torch.nan)
    scaled = (x.to(wide) * power_of_two(k).to(wide)).clamp(-_LARGEST[kind], _LARGEST[kind])
    codes = _padded(torch.where(x.abs() < torch.inf, scaled, torch.nan)).to(kind).view(torch.uint8)
    nothing = codes.new_empty(0, 0)
    return codes if by_row else nothing, codes.mT.contiguous() if by_column else nothing, down


@operator()
def largest_bits(x: Tensor) -> Tensor:
    """As `portable_largest`, but where an element is NaN, some NaN."""
    return _kernels().largest_bits(x)


@operator()
def round_to_8_bits(
    x: Tensor, largest: Tensor | None, power: int, gradient: bool, by_row: bool, by_column: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `portable_rounded`."""
    out = _empty(x, largest, power, gradient, by_row, by_column)
    rows, columns, down = out
    _kernels().round_to_8_bits(
        x, largest, power, gradient, rows if by_row else None, columns if by_column else None, down
    )
    return out


def _empty(
    x: Tensor, largest: Tensor | None, power: int, gradient: bool, by_row: bool, by_column: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = map(aligned, x.shape)
    return (
        x.new_empty((rows, columns) if by_row else (0, 0), dtype=torch.uint8),
        x.new_empty((columns, rows) if by_column else (0, 0), dtype=torch.uint8),
        x.new_empty((), dtype=torch.float32),
    )


register_fake("largest_bits", lambda x: x.new_empty((), dtype=torch.int32))
register_fake("round_to_8_bits", _empty)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _padded(x: Tensor) -> Tensor:
    rows, columns = (aligned(size) - size for size in x.shape)
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x
