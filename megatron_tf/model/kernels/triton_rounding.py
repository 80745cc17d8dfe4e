"""Rounding to 8 bits on GPUs: model/rounding.py says what is computed, and does the same in PyTorch.

A matrix is read once for its largest magnitude and once to be rounded. The second pass writes the 8-bit numbers row by
row, column by column, or both, padded with zeros. Nothing waits for the host: the scale stays on the device.

The largest magnitude is found as an integer: without their sign, fp32 numbers are in the order of their bits, with NaN
above infinity. So programs combine theirs by an atomic maximum, whose result does not depend on their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Not tuned on a GPU yet. A tile of 64 bytes a side fills two sectors of memory in each layout.
TILE, WARPS = 64, 4
SEARCHED_ROWS, SEARCHED_COLUMNS = 16, 256  # the block that a program looks through at a time

_SIGN = tl.constexpr(0x7FFFFFFF)  # all bits of fp32 but its sign
_INFINITY = tl.constexpr(0x7F800000)
_CARRY = tl.constexpr(0x1FFFFF)
_NAN = tl.constexpr(0x7F)


def largest_bits(x: Tensor) -> Tensor:
    """Bits of the largest magnitude in x [m, n], as fp32: int32 []."""
    found = torch.zeros((), dtype=torch.int32, device=x.device)
    (m, n), blocks = x.shape, triton.cdiv(x.shape[0], SEARCHED_ROWS)
    if blocks:
        sizes = {"ROWS": SEARCHED_ROWS, "COLUMNS": SEARCHED_COLUMNS}
        _largest[(blocks,)](x, _row_stride(x), m, n, found, **sizes, num_warps=WARPS)
    return found


def round_to_8_bits(
    x: Tensor,
    largest: Tensor | None,
    power: int,
    gradient: bool,
    by_row: Tensor | None,
    by_column: Tensor | None,
    down: Tensor,
) -> None:
    """Writes 2ᵏ x, for x [m, n], into `by_row` [m', n'] and `by_column` [n', m'], which are uint8, and 2⁻ᵏ into `down`.

    `largest`: of x, from which k is found; None: k is `power`.
    """
    m, n = x.shape
    if by_row is not None:
        rows, columns = by_row.shape
    else:
        assert by_column is not None
        columns, rows = by_column.shape
    _round[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](
        x,
        _row_stride(x),
        m,
        n,
        largest,
        power,
        by_row,
        by_column,
        down,
        rows,
        columns,
        GRADIENT=gradient,
        HARDWARE=isinstance(_round, triton.JITFunction),
        TILE=TILE,
        num_warps=WARPS,
    )


def _row_stride(x: Tensor) -> int:
    assert x.stride(1) == 1 or x.shape[1] == 1, "neighbours in a row side by side"
    return x.stride(0)


@triton.jit
def _wide(x):
    """x in fp32. Triton's interpreter changes bf16 numbers below 2⁻¹²⁶ in a conversion, so it is made from the bits."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _largest(x, stride, m, n, found, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = x + row.to(tl.int64)[:, None] * stride
    top = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < m)[:, None] & (column < n)[None, :]
        values = _wide(tl.load(rows + column[None, :], mask=inside, other=0.0))
        top = tl.maximum(top, values.to(tl.int32, bitcast=True) & _SIGN)
    tl.atomic_max(found, tl.max(tl.max(top, 1), 0), sem="relaxed")


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _power_from(largest, down, first, GRADIENT: tl.constexpr):
    """k from the largest magnitude. The `first` program writes 2⁻ᵏ into `down`, or NaN where that is not finite."""
    top = tl.load(largest)
    exponent = ((tl.minimum(top, _INFINITY) + _CARRY) >> 23) - 127
    power = tl.maximum(tl.minimum((15 if GRADIENT else 8) - exponent, 126), -126)
    tl.store(down, tl.where(top < _INFINITY, _power_of_two(-power), float("nan")), mask=first)
    return power


@triton.jit
def _put_tile(matrix, stride, row, column, bits, rows, columns):
    place = row.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(matrix + place, bits, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _bits(x, up, GRADIENT: tl.constexpr, HARDWARE: tl.constexpr):
    """The bits of x · up in 8 bits, rounded to the nearest, saturating, where x is finite; those of NaN elsewhere.

    `HARDWARE`: by the conversion that GPUs have from compute capability 8.9 on. Triton's interpreter cuts digits off
    there, so it takes the other way, by integers.
    """
    finite = (x.to(tl.int32, bitcast=True) & _SIGN) < _INFINITY
    scaled = x * up
    if HARDWARE:
        kept = tl.where(finite, scaled, float("nan"))
        if GRADIENT:
            return kept.to(tl.float8e5).to(tl.uint8, bitcast=True)
        else:
            return kept.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    MANTISSA: tl.constexpr = 2 if GRADIENT else 3
    BIAS: tl.constexpr = 15 if GRADIENT else 7
    MOST: tl.constexpr = 0x7B if GRADIENT else 0x7E
    DROPPED: tl.constexpr = 23 - MANTISSA
    bits = scaled.to(tl.int32, bitcast=True) & _SIGN
    # Halves go to the even number.
    rounded = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED
    normal = rounded - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number, the sum with this one has the last digit where theirs is.
    ANCHOR: tl.constexpr = (24 - BIAS - MANTISSA + 127) << 23
    anchor = tl.full(x.shape, ANCHOR, tl.int32).to(tl.float32, bitcast=True)
    subnormal = (tl.abs(scaled) + anchor).to(tl.int32, bitcast=True) - ANCHOR
    code = tl.minimum(tl.where(bits < ((128 - BIAS) << 23), subnormal, normal), MOST)
    sign = (scaled.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(finite, code | sign, _NAN).to(tl.uint8)


@triton.jit(do_not_specialize=["power"])
def _round(
    x, stride, m, n, largest, power, by_row, by_column, down, rows, columns,
    GRADIENT: tl.constexpr, HARDWARE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    if largest is None:
        tl.store(down, _power_of_two(-power), mask=first)
    else:
        power = _power_from(largest, down, first, GRADIENT)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (row < m)[:, None] & (column < n)[None, :]
    values = tl.load(x + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
    bits = _bits(_wide(values), _power_of_two(power), GRADIENT, HARDWARE)
    if by_row is not None:
        _put_tile(by_row, columns, row, column, bits, rows, columns)
    if by_column is not None:
        _put_tile(by_column, rows, column, row, tl.trans(bits), columns, rows)
