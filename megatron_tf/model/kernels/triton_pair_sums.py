"""The sum over the slots on GPUs: pair_sums.py.

A program sums a block of columns of one row, in the order of the slots, so results are deterministic. A block is a
warp's: the pairs of a row lie far apart, and many small programs wait for memory at the same time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_tf.model.kernels.triton_passes import SUPPORTED_DTYPES, WARP, load_block, store_block

__all__ = ["SUPPORTED_DTYPES", "sum_of_pairs"]


def sum_of_pairs(of_pairs: Tensor, places: Tensor, total: Tensor, add: bool) -> None:
    """`add`: whether `total` is added to, or overwritten."""
    rows, width = total.shape
    if rows == 0:
        return
    assert places.is_contiguous() and of_pairs.stride(1) == total.stride(1) == 1
    grid = rows, triton.cdiv(width, WARP)
    _sum[grid](
        of_pairs, of_pairs.stride(0), places, total, total.stride(0), width, places.shape[1], ADD=add, BLOCK=WARP,
        num_warps=1,
    )  # fmt: skip


@triton.jit
def _sum(of_pairs, p_stride, places, total, t_stride, n, slots, ADD: tl.constexpr, BLOCK: tl.constexpr):
    # Offsets have 64 bits, because the products of all pairs may be more than 2³¹ numbers.
    row, start = tl.program_id(0).to(tl.int64) + tl.arange(0, 1), tl.program_id(1) * BLOCK
    summed = tl.zeros((1, BLOCK), tl.float32)
    for slot in range(slots):
        place = tl.load(places + row * slots + slot).to(tl.int64)
        summed += load_block(of_pairs, place, p_stride, start, n, BLOCK)
    if ADD:
        summed += load_block(total, row, t_stride, start, n, BLOCK)
    store_block(total, row, row >= 0, t_stride, start, n, summed, BLOCK)
