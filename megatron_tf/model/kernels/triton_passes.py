"""The elementwise passes of `l2_norm_gelu` on GPUs: fused_passes.py names them, activations/l2_norm.py has the
formulas.

A program has a row, or several short ones, and works on blocks that fit the registers. Two passes in one kernel keep
the row in registers between them, or, where it is too long, read it again from the cache: either saves a read from
memory. As one program sums a row, results are deterministic. On an H200 the instructions of GELU, not memory, bound a
pass unless they are few.
"""

# Triton's tuples grow, whose types mypy takes for those of empty ones.
# mypy: disable-error-code="assignment, unreachable"

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LEAST = tl.constexpr(1e-16)  # norms up to this count as 0, see activations/l2_norm.py
WARP = 256  # columns of a warp: 8 for each thread, 16 bytes of bf16


class Block(NamedTuple):
    """How a program works on rows of up to `longest` bytes, None for any: `columns` at a time, `per_warp` of each warp.

    `held`: two passes keep the whole row in registers.
    """

    longest: int | None
    columns: int
    per_warp: int
    held: bool = False


# The fastest of seven settings on an H200, in bf16, for rows of 2,144 to 34,480 columns; of two passes in one kernel on
# an H100.
SINGLE = Block(8_192, 1024, WARP), Block(32_768, 2048, WARP), Block(None, 8192, 2 * WARP)
FORWARD = (
    Block(8_192, 1024, WARP, held=True),
    Block(32_768, 2048, WARP, held=True),
    Block(73_728, 4096, WARP // 2, held=True),
    Block(None, 8192, 2 * WARP),
)
BACKWARD = (
    Block(8_192, 1024, WARP, held=True),
    Block(20_480, 2048, WARP, held=True),
    Block(32_768, 4096, 2 * WARP),
    Block(None, 8192, WARP),
)
# (rows of a program, its warps) for rows that one warp reads at once, as those of a bank's groups: the fastest of six
# settings on an H100. Backward passes take more registers.
SHORT, SHORT_BACKWARD = (8, 4), (1, 1)


def is_available() -> bool:
    return True


def norm(scores: Tensor, norms: Tensor) -> None:
    _launch(_norm, scores, norms)


def weights(scores: Tensor, norms: Tensor, weights: Tensor, scale: float) -> None:
    _launch(_weights, scores, norms, weights, scale=scale)


def norm_and_weights(scores: Tensor, norms: Tensor, weights: Tensor, scale: float) -> None:
    _launch(_norm_and_weights, scores, norms, weights, scale=scale, two_passes=FORWARD)


def backward(scores: Tensor, norms: Tensor, gradient: Tensor, weights: Tensor, totals: Tensor, scale: float) -> None:
    _launch(_backward, scores, norms, gradient, weights, totals, scale=scale, short=SHORT_BACKWARD)


def backward_with_product(
    scores: Tensor,
    norms: Tensor,
    gradient: Tensor,
    weights: Tensor,
    totals: Tensor,
    products: Tensor,
    scale: float,
) -> None:
    others = gradient, weights, totals, products
    _launch(_backward_with_product, scores, norms, *others, scale=scale, short=SHORT_BACKWARD)


def couple(scores: Tensor, norms: Tensor, totals: Tensor, gradient: Tensor) -> None:
    _launch(_couple, scores, norms, totals, gradient)


def backward_and_couple(scores: Tensor, norms: Tensor, gradient: Tensor, weights: Tensor, scale: float) -> None:
    others = norms, gradient, weights
    _launch(_backward_and_couple, scores, *others, scale=scale, short=SHORT_BACKWARD, two_passes=BACKWARD)


def _launch(
    kernel: triton.JITFunction,
    scores: Tensor,
    *others: Tensor,
    short: tuple[int, int] = SHORT,
    two_passes: tuple[Block, ...] | None = None,
    **scale: float,
) -> None:
    """Starts `kernel` with address and row stride of each tensor.

    `two_passes`: the blocks of a kernel that can hold its rows. It is told their parts, 0 of rows too long for that.
    """
    rows, n = scores.shape
    if rows == 0:
        return
    arguments: list[Tensor | int] = []
    for tensor in (scores, *others):
        assert tensor.stride(1) == 1 or tensor.shape[1] == 1, "neighbours in a row side by side"
        arguments += tensor, tensor.stride(0)
    block = _block(two_passes or SINGLE, n, scores.element_size())
    parts = {"PARTS": triton.cdiv(n, block.columns) if block.held else 0} if two_passes else {}
    many, warps = short if n <= WARP else (1, block.columns // block.per_warp)
    kernel[(triton.cdiv(rows, many),)](
        *arguments, rows, n, **scale, **parts, ROWS=many, BLOCK=block.columns, num_warps=warps
    )


@cache
def _block(blocks: tuple[Block, ...], n: int, element_size: int) -> Block:
    """That of rows of n elements, and not longer than they are."""
    block = next(own for own in blocks if own.longest is None or n * element_size <= own.longest)
    return block._replace(columns=min(block.columns, max(WARP, triton.next_power_of_2(n + 1) // 2)))


@triton.jit
def _own_rows(rows, ROWS: tl.constexpr):
    """(this program's rows [ROWS], which of them are there). The others repeat the last row, and are not stored.

    Offsets have 64 bits, because a large batch has more than 2³¹ scores.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return tl.minimum(row, rows - 1), row < rows


# Blocks are [ROWS, BLOCK]. One that lies within its rows is read without a mask, so that each thread moves 16 bytes at
# a time for any n.
@triton.jit
def load_block(pointer, row, stride, start, n, BLOCK: tl.constexpr):
    """The numbers of the rows from `start` on, in fp32; zeros after their end."""
    if start + BLOCK <= n:  # noqa: SIM108  as a statement it is a branch
        values = _load(pointer, row, stride, start, n, BLOCK, False)
    else:
        values = _load(pointer, row, stride, start, n, BLOCK, True)
    return values.to(tl.float32)


@triton.jit
def store_block(pointer, row, there, stride, start, n, values, BLOCK: tl.constexpr):
    if start + BLOCK <= n:
        _store(pointer, row, there, stride, start, n, values, BLOCK, False)
    else:
        _store(pointer, row, there, stride, start, n, values, BLOCK, True)


@triton.jit
def _load(pointer, row, stride, start, n, BLOCK: tl.constexpr, LAST: tl.constexpr):
    """As `load_block`, in the type of the matrix.  LAST: the block may reach over the rows' end."""
    columns = (start + tl.arange(0, BLOCK))[None, :]
    source = pointer + row[:, None] * stride + columns
    if LAST:
        return tl.load(source, mask=columns < n, other=0.0)
    else:  # Triton compiles what follows a return
        return tl.load(source)


@triton.jit
def _store(pointer, row, there, stride, start, n, values, BLOCK: tl.constexpr, LAST: tl.constexpr):
    columns = (start + tl.arange(0, BLOCK))[None, :]
    to = pointer + row[:, None] * stride + columns
    rounded = values.to(pointer.dtype.element_ty)
    if LAST:
        tl.store(to, rounded, mask=there[:, None] & (columns < n))
    else:
        tl.store(to, rounded, mask=there[:, None])


@triton.jit
def _over(numerator, r):
    """numerator / r; 0 where r is at most LEAST, and NaN where the sum of squares has overflowed."""
    over = tl.where(r > LEAST, numerator / tl.where(r > LEAST, r, 1.0), 0.0)
    return tl.where(r <= 3.4e38, over, float("nan"))  # also of NaN, which the Gram form makes of an overflow


@triton.jit
def _over_square(numerator, r):
    """numerator / r², and 0 where r is at most LEAST."""
    return tl.where(r > LEAST, numerator / tl.where(r > LEAST, r * r, 1.0), 0.0)


@triton.jit
def _gelu(u):
    """(GELU, its derivative) at u, from the standard normal distribution and its density.

    Both come from one exponential, by Abramowitz & Stegun 7.1.26, as in native_passes.c. The error is at most 7.5e-8,
    about the rounding of fp32 at 1, and smaller where the distribution is small, with half the instructions of erf.
    exp2 and rsqrt are one instruction each; exp and a division are not.
    """
    e = tl.exp2(u * u * -0.7213475204444817)
    t = tl.rsqrt(1.0 + 0.231641888 * tl.abs(u))
    t = t * t
    p = 0.5307027145 * t - 0.7265760135
    p = p * t + 0.7107068705
    p = p * t - 0.142248368
    p = p * t + 0.127414796
    tail = p * t * e
    distribution = tl.where(u < 0, tail, 1.0 - tail)
    return u * distribution, distribution + u * 0.3989422804014327 * e


@triton.jit
def _norms_of(scores, a_stride, row, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, n, BLOCK):
        a = load_block(scores, row, a_stride, start, n, BLOCK)
        squares += a * a
    return tl.sqrt(tl.sum(squares, 1))


@triton.jit
def _make_weights(scores, a_stride, weights, s_stride, factor, row, there, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        gelu, _ = _gelu(load_block(scores, row, a_stride, start, n, BLOCK) * factor[:, None])
        store_block(weights, row, there, s_stride, start, n, gelu, BLOCK)


@triton.jit
def _make_gradients(
    scores, a_stride, gradient, d_stride, weights, s_stride, factor, row, there, n, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Replaces dS by D, writes S, and returns T."""
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, n, BLOCK):
        score = load_block(scores, row, a_stride, start, n, BLOCK)
        gelu, slope = _gelu(score * factor[:, None])
        g = load_block(gradient, row, d_stride, start, n, BLOCK) * slope * factor[:, None]
        total += g * score
        store_block(gradient, row, there, d_stride, start, n, g, BLOCK)
        store_block(weights, row, there, s_stride, start, n, gelu, BLOCK)
    return tl.sum(total, 1)


@triton.jit
def _make_coupled(scores, a_stride, gradient, d_stride, coupling, row, there, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        score = load_block(scores, row, a_stride, start, n, BLOCK)
        g = load_block(gradient, row, d_stride, start, n, BLOCK) - score * coupling[:, None]
        store_block(gradient, row, there, d_stride, start, n, g, BLOCK)


@triton.jit
def _norm(scores, a_stride, norms, r_stride, rows, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, there = _own_rows(rows, ROWS)
    tl.store(norms + row * r_stride, _norms_of(scores, a_stride, row, n, ROWS, BLOCK), mask=there)


@triton.jit
def _weights(
    scores, a_stride, norms, r_stride, weights, s_stride, rows, n, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, there = _own_rows(rows, ROWS)
    factor = _over(scale, tl.load(norms + row * r_stride))
    _make_weights(scores, a_stride, weights, s_stride, factor, row, there, n, BLOCK)


@triton.jit
def _norm_and_weights(
    scores, a_stride, norms, r_stride, weights, s_stride, rows, n, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    row, there = _own_rows(rows, ROWS)
    if PARTS == 0:
        r = _norms_of(scores, a_stride, row, n, ROWS, BLOCK)
        tl.store(norms + row * r_stride, r, mask=there)
        _make_weights(scores, a_stride, weights, s_stride, _over(scale, r), row, there, n, BLOCK)
    else:
        held = ()
        squares = tl.zeros((ROWS, BLOCK), tl.float32)
        for i in tl.static_range(PARTS):
            score = _load(scores, row, a_stride, i * BLOCK, n, BLOCK, i == PARTS - 1)
            squares += score.to(tl.float32) * score.to(tl.float32)
            held = held + (score,)
        r = tl.sqrt(tl.sum(squares, 1))
        tl.store(norms + row * r_stride, r, mask=there)
        factor = _over(scale, r)[:, None]
        for i in tl.static_range(PARTS):
            gelu, _ = _gelu(held[i].to(tl.float32) * factor)
            _store(weights, row, there, s_stride, i * BLOCK, n, gelu, BLOCK, i == PARTS - 1)


@triton.jit
def _backward(
    scores, a_stride, norms, r_stride, gradient, d_stride, weights, s_stride, totals, t_stride, rows, n, scale,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, there = _own_rows(rows, ROWS)
    factor = _over(scale, tl.load(norms + row * r_stride))
    total = _make_gradients(
        scores, a_stride, gradient, d_stride, weights, s_stride, factor, row, there, n, ROWS, BLOCK
    )  # fmt: skip
    tl.store(totals + row * t_stride, total, mask=there)


@triton.jit
def _backward_with_product(
    scores, a_stride, norms, r_stride, gradient, d_stride, weights, s_stride, totals, t_stride, products, p_stride,
    rows, n, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, there = _own_rows(rows, ROWS)
    factor = _over(scale, tl.load(norms + row * r_stride))[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    product = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, n, BLOCK):
        score = load_block(scores, row, a_stride, start, n, BLOCK)
        gelu, slope = _gelu(score * factor)
        ds = load_block(gradient, row, d_stride, start, n, BLOCK)
        g = ds * slope * factor
        total += g * score
        product += ds * gelu
        store_block(gradient, row, there, d_stride, start, n, g, BLOCK)
        store_block(weights, row, there, s_stride, start, n, gelu, BLOCK)
    tl.store(totals + row * t_stride, tl.sum(total, 1), mask=there)
    tl.store(products + row * p_stride, tl.sum(product, 1), mask=there)


@triton.jit
def _couple(
    scores, a_stride, norms, r_stride, totals, t_stride, gradient, d_stride, rows, n, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, there = _own_rows(rows, ROWS)
    r = tl.load(norms + row * r_stride)
    coupling = _over_square(tl.load(totals + row * t_stride), r)
    _make_coupled(scores, a_stride, gradient, d_stride, coupling, row, there, n, BLOCK)


@triton.jit
def _make_block(
    scores, a_stride, gradient, d_stride, weights, s_stride, factor, row, there, start, n, BLOCK: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """Writes S of a block, and returns its scores and D."""
    score = _load(scores, row, a_stride, start, n, BLOCK, LAST).to(tl.float32)
    ds = _load(gradient, row, d_stride, start, n, BLOCK, LAST).to(tl.float32)
    gelu, slope = _gelu(score * factor)
    _store(weights, row, there, s_stride, start, n, gelu, BLOCK, LAST)
    return score, ds * slope * factor


@triton.jit
def _backward_and_couple(
    scores, a_stride, norms, r_stride, gradient, d_stride, weights, s_stride, rows, n, scale, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, there = _own_rows(rows, ROWS)
    r = tl.load(norms + row * r_stride)
    factor = _over(scale, r)[:, None]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    if PARTS == 0:
        last = (tl.cdiv(n, BLOCK) - 1) * BLOCK
        for start in range(0, last, BLOCK):
            score, d = _make_block(
                scores, a_stride, gradient, d_stride, weights, s_stride, factor, row, there, start, n, BLOCK, False
            )  # fmt: skip
            total += d * score
        score, d = _make_block(
            scores, a_stride, gradient, d_stride, weights, s_stride, factor, row, there, last, n, BLOCK, True
        )  # fmt: skip
        coupling = _over_square(tl.sum(total + d * score, 1), r)[:, None]
        _store(gradient, row, there, d_stride, last, n, d - score * coupling, BLOCK, True)
        # It takes less time to compute D again than to write it and read it back.
        for start in range(0, last, BLOCK):
            score = _load(scores, row, a_stride, start, n, BLOCK, False).to(tl.float32)
            ds = _load(gradient, row, d_stride, start, n, BLOCK, False).to(tl.float32)
            _, slope = _gelu(score * factor)
            _store(gradient, row, there, d_stride, start, n, ds * slope * factor - score * coupling, BLOCK, False)
    else:
        held = ()
        given = ()
        made = ()
        for i in tl.static_range(PARTS):
            held = held + (_load(scores, row, a_stride, i * BLOCK, n, BLOCK, i == PARTS - 1),)
            given = given + (_load(gradient, row, d_stride, i * BLOCK, n, BLOCK, i == PARTS - 1),)
        for i in tl.static_range(PARTS):
            score = held[i].to(tl.float32)
            gelu, slope = _gelu(score * factor)
            _store(weights, row, there, s_stride, i * BLOCK, n, gelu, BLOCK, i == PARTS - 1)
            d = given[i].to(tl.float32) * slope * factor
            total += d * score
            # In the type of the matrix it takes half the registers.
            made = made + (d.to(gradient.dtype.element_ty),)
        coupling = _over_square(tl.sum(total, 1), r)[:, None]
        for i in tl.static_range(PARTS):
            da = made[i].to(tl.float32) - held[i].to(tl.float32) * coupling
            _store(gradient, row, there, d_stride, i * BLOCK, n, da, BLOCK, i == PARTS - 1)
