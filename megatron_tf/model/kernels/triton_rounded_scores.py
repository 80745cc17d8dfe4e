"""The passes over scores of `l2_norm_gelu` on GPUs whose results are in 8 bits. model/rounded_scores.py says what they
compute.

The scales are known before, so S and D are never written in 16 bits. A program works on a stretch of some rows, tile by
tile, because numbers are also written column by column. It adds up its part of T; the parts are summed afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_tf.model.kernels.triton_passes import _gelu, _over
from megatron_tf.model.kernels.triton_rounding import TILE, WARPS, _bits, _power_from, _power_of_two, _put_tile, _wide

BACKWARD_WARPS = 8  # with 4, a thread holds so many numbers that few programs fit on a processor


def weights(scores: Tensor, norms: Tensor, scale: float, power: int, by_row: Tensor, down: Tensor) -> None:
    """Writes S of scores [m, n] and norms [m, 1], in e4m3: 2ᵏ S into `by_row` [m', n'], and 2⁻ᵏ; k is `power`."""
    (m, n), (rows, columns) = scores.shape, by_row.shape
    _weights[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](
        scores, scores.stride(0), norms, norms.stride(0), m, n, scale, power, by_row, down, rows, columns,
        HARDWARE=isinstance(_weights, triton.JITFunction), TILE=TILE, num_warps=WARPS,
    )  # fmt: skip


def backward(
    scores: Tensor,
    norms: Tensor,
    gradient: Tensor,
    scale: float,
    power: int,
    weights: Tensor,
    weights_down: Tensor,
    largest: Tensor,
    by_row: Tensor | None,
    by_column: Tensor,
    down: Tensor,
    totals: Tensor,
    stretch: int,
) -> None:
    """Of scores and dS [m, n]: S in e4m3 into `weights` [n', m'], and D in e5m2.

    D goes into `by_row` [m', n'], whose rows may lie apart, and into `by_column` [n', m']. Its scale is for numbers up
    to `largest`, an fp32 number in its bits.  `totals` [m, stretches]: T over each `stretch` of columns.
    """
    (m, n), (columns, rows) = scores.shape, weights.shape
    _backward[(triton.cdiv(rows, TILE), totals.shape[1])](
        scores, scores.stride(0), norms, norms.stride(0), gradient, gradient.stride(0), m, n, scale, power, weights,
        weights_down, largest, by_row, 0 if by_row is None else by_row.stride(0), by_column, down, totals, rows,
        columns, STRETCH=stretch, HARDWARE=isinstance(_backward, triton.JITFunction), TILE=TILE,
        num_warps=BACKWARD_WARPS,
    )  # fmt: skip


@triton.jit
def _tile(matrix, stride, row, column, m, n):
    """Numbers of a matrix [m, n] in fp32; zeros outside."""
    inside = (row < m)[:, None] & (column < n)[None, :]
    return _wide(tl.load(matrix + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0))


@triton.jit
def _factors(norms, stride, row, m, scale):
    return _over(scale, tl.load(norms + row.to(tl.int64) * stride, mask=row < m, other=0.0))[:, None]


@triton.jit(do_not_specialize=["power"])
def _weights(
    scores, a_stride, norms, r_stride, m, n, scale, power, by_row, down, rows, columns,
    HARDWARE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    tl.store(down, _power_of_two(-power), mask=first)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    a = _tile(scores, a_stride, row, column, m, n)
    gelu, _ = _gelu(a * _factors(norms, r_stride, row, m, scale))
    bits = _bits(gelu, _power_of_two(power), False, HARDWARE)
    _put_tile(by_row, columns, row, column, bits, rows, columns)


@triton.jit(do_not_specialize=["power"])
def _backward(
    scores, a_stride, norms, r_stride, gradient, d_stride, m, n, scale, power, weights, weights_down, largest,
    by_row, row_stride, by_column, down, totals, rows, columns,
    STRETCH: tl.constexpr, HARDWARE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    first = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    tl.store(weights_down, _power_of_two(-power), mask=first)
    of_gradient = _power_from(largest, down, first, True)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    factors = _factors(norms, r_stride, row, m, scale)
    total = tl.zeros((TILE,), tl.float32)
    begin = tl.program_id(1) * STRETCH
    for start in range(begin, tl.minimum(begin + STRETCH, columns), TILE):
        column = start + tl.arange(0, TILE)
        a = _tile(scores, a_stride, row, column, m, n)
        gelu, slope = _gelu(a * factors)
        d = _tile(gradient, d_stride, row, column, m, n) * slope * factors
        total += tl.sum(d * a, 1)
        bits = _bits(gelu, _power_of_two(power), False, HARDWARE)
        _put_tile(weights, rows, column, row, tl.trans(bits), columns, rows)
        bits = _bits(d, _power_of_two(of_gradient), True, HARDWARE)
        if by_row is not None:
            _put_tile(by_row, row_stride, row, column, bits, rows, columns)
        _put_tile(by_column, rows, column, row, tl.trans(bits), columns, rows)
    tl.store(totals + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), total, mask=row < m)
