"""Grouped products of gathered rows on GPUs: gathered_products.py.

A program computes a tile of a result. It reads the rows of its pairs where they are: no copy of rows for all pairs is
made, and when several slots read a row, it comes from the cache. The sizes of groups are read on the device. The number
of programs depends on shapes alone, and those that have no tile end at once.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles of scores: pairs, tokens, channels of a step of the sum.  Of gradients: tokens, channels, pairs of a step.
# The fastest of six settings each on an H100, with groups of 256 tokens of 768 channels.
SCORES = {"PAIRS": 128, "TOKENS": 256, "STEP": 64, "num_warps": 8}
GRADIENTS = {"TOKENS": 128, "CHANNELS": 128, "STEP": 64, "num_warps": 4}
STAGES = 4  # factors of so many steps are in a multiprocessor's memory at once, or of as many as fit


def scores(x: Tensor, rows: Tensor, tokens: Tensor, ends: Tensor, out: Tensor) -> None:
    """x [rows, k], rows [pairs], tokens [groups, g, k], ends [groups] -> out [pairs, g]."""
    groups, size, width = tokens.shape
    if len(rows) == 0:
        return
    assert x.stride(1) == out.stride(1) == 1 and tokens.is_contiguous()
    # each group fills its last tile in part
    tiles = triton.cdiv(len(rows), SCORES["PAIRS"]) + groups
    _scores[tiles, triton.cdiv(size, SCORES["TOKENS"])](
        x, x.stride(0), rows, tokens, ends, groups, out, out.stride(0), size, width, **SCORES,
        num_stages=stages_in(_memory(x.device), x.itemsize, SCORES), GROUPS=triton.next_power_of_2(groups),
        WHOLE=width % SCORES["STEP"] == 0 and size % SCORES["TOKENS"] == 0,
    )  # fmt: skip


def gradients(scores: Tensor, rows: Tensor, x: Tensor, ends: Tensor, out: Tensor) -> None:
    """scores [pairs, g], rows [pairs], x [rows, k], ends [groups] -> out [groups, g, k], 0 for groups without pairs."""
    groups, size, width = out.shape
    assert x.stride(1) == scores.stride(1) == 1 and out.is_contiguous()
    down, across = triton.cdiv(size, GRADIENTS["TOKENS"]), triton.cdiv(width, GRADIENTS["CHANNELS"])
    _gradients[groups * down * across,](
        scores, scores.stride(0), rows, x, x.stride(0), ends, out, size, width, down * across, across, **GRADIENTS,
        num_stages=stages_in(_memory(x.device), x.itemsize, GRADIENTS),
        WHOLE=size % GRADIENTS["TOKENS"] == 0 and width % GRADIENTS["CHANNELS"] == 0,
    )  # fmt: skip


def stages_in(memory: int, itemsize: int, tile: dict[str, int]) -> int:
    """The number of steps whose factors fit in `memory` bytes, at most STAGES."""
    sides = sum(tile.get(side, 0) for side in ("PAIRS", "TOKENS", "CHANNELS"))
    return max(1, min(STAGES, memory // (sides * tile["STEP"] * itemsize)))


@cache
def _memory(device: torch.device) -> int:
    """The bytes of a multiprocessor's memory that one program can use."""
    if device.type != "cuda":
        return 2**30  # Triton's interpreter
    # ROCm does not say it; no GPU of it has less
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2**16)


@triton.jit
def _tile(ends, groups, tile, PAIRS: tl.constexpr, GROUPS: tl.constexpr):
    """(group, first pair, end of the group's pairs) of a tile; first and end are equal for a tile that is not there."""
    numbers = tl.arange(0, GROUPS)
    there = numbers < groups
    stop = tl.load(ends + numbers, mask=there, other=0)
    start = tl.load(ends + numbers - 1, mask=there & (numbers > 0), other=0)
    tiles = (stop - start + PAIRS - 1) // PAIRS
    tiles = tl.where(there, tiles, 0)
    place = tile - (tl.cumsum(tiles) - tiles)
    own = (place >= 0) & (place < tiles)
    group = tl.sum(tl.where(own, numbers, 0))
    first = tl.sum(tl.where(own, start + place * PAIRS, 0))
    return group, first, tl.sum(tl.where(own, stop, 0))


@triton.jit
def _scores(
    x, x_stride, rows, tokens, ends, groups, out, o_stride, size, width, PAIRS: tl.constexpr, TOKENS: tl.constexpr,
    STEP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    group, first, end = _tile(ends, groups, tl.program_id(0), PAIRS, GROUPS)
    if first < end:
        pairs = first + tl.arange(0, PAIRS)
        there = pairs < end
        row = tl.load(rows + pairs, mask=there, other=0).to(tl.int64)
        token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        channels = tl.arange(0, STEP)
        left = x + row[:, None] * x_stride + channels[None, :]
        right = tokens + (group * size + token).to(tl.int64)[None, :] * width + channels[:, None]
        total = tl.zeros((PAIRS, TOKENS), tl.float32)
        for start in range(0, width, STEP):
            if WHOLE:
                a, b = tl.load(left), tl.load(right)
            else:
                rest = start + channels < width
                a = tl.load(left, mask=rest[None, :], other=0.0)
                b = tl.load(right, mask=rest[:, None] & (token < size)[None, :], other=0.0)
            total = tl.dot(a, b, total)
            left += STEP
            right += STEP
        to = out + pairs.to(tl.int64)[:, None] * o_stride + token[None, :]
        stored = there[:, None] if WHOLE else there[:, None] & (token < size)[None, :]
        tl.store(to, total.to(out.dtype.element_ty), mask=stored)


@triton.jit
def _gradients(
    scores, s_stride, rows, x, x_stride, ends, out, size, width, tiles, across, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    token = tile // across * TOKENS + tl.arange(0, TOKENS)
    channel = tile % across * CHANNELS + tl.arange(0, CHANNELS)
    end = tl.load(ends + group)
    begin = tl.load(ends + group - 1, mask=group > 0, other=0)
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for start in range(begin, end, STEP):
        pairs = start + tl.arange(0, STEP)
        there = pairs < end
        row = tl.load(rows + pairs, mask=there, other=0).to(tl.int64)
        left = scores + pairs.to(tl.int64)[:, None] * s_stride + token[None, :]
        right = x + row[:, None] * x_stride + channel[None, :]
        if WHOLE:
            a, b = tl.load(left, mask=there[:, None], other=0.0), tl.load(right, mask=there[:, None], other=0.0)
        else:
            a = tl.load(left, mask=there[:, None] & (token < size)[None, :], other=0.0)
            b = tl.load(right, mask=there[:, None] & (channel < width)[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total)
    to = out + (group * size + token).to(tl.int64)[:, None] * width + channel[None, :]
    if WHOLE:
        tl.store(to, total.to(out.dtype.element_ty))
    else:
        tl.store(to, total.to(out.dtype.element_ty), mask=(token < size)[:, None] & (channel < width)[None, :])
