"""The elementwise passes of `l2_norm_gelu` on GPUs: fused_passes.py names them, activations/l2_norm.py has the
formulas.

Each row is one program, which works on blocks that fit the registers. A second read of a row comes from the cache, so
two passes in one kernel save one read of the scores from memory. As one program sums a row, results are deterministic.
On an H200 the instructions of GELU, not memory, bound a pass unless they are few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WARP = 256  # columns of a warp: 8 for each thread, 16 bytes of bf16
# (rows up to this length, columns of a block, columns of a warp): the fastest of seven settings on an H200, in bf16,
# for rows of 2,144 to 34,480 columns.
BLOCKS = ((4096, 1024, WARP), (16384, 2048, WARP), (None, 8192, 2 * WARP))


def is_available() -> bool:
    return True


def norm(scores: Tensor, norms: Tensor) -> None:
    _launch(_norm, scores, norms)


def weights(scores: Tensor, norms: Tensor, weights: Tensor, scale: float) -> None:
    _launch(_weights, scores, norms, weights, scale=scale)


def norm_and_weights(scores: Tensor, norms: Tensor, weights: Tensor, scale: float) -> None:
    _launch(_norm_and_weights, scores, norms, weights, scale=scale)


def backward(scores: Tensor, norms: Tensor, gradient: Tensor, weights: Tensor, totals: Tensor, scale: float) -> None:
    _launch(_backward, scores, norms, gradient, weights, totals, scale=scale)


def backward_with_product(
    scores: Tensor,
    norms: Tensor,
    gradient: Tensor,
    weights: Tensor,
    totals: Tensor,
    products: Tensor,
    scale: float,
) -> None:
    _launch(_backward_with_product, scores, norms, gradient, weights, totals, products, scale=scale)


def couple(scores: Tensor, norms: Tensor, totals: Tensor, gradient: Tensor) -> None:
    _launch(_couple, scores, norms, totals, gradient)


def backward_and_couple(scores: Tensor, norms: Tensor, gradient: Tensor, weights: Tensor, scale: float) -> None:
    _launch(_backward_and_couple, scores, norms, gradient, weights, scale=scale)


def _launch(kernel: triton.JITFunction, scores: Tensor, *others: Tensor, **scale: float) -> None:
    """Starts `kernel`, one program for each row, with address and row stride of each tensor."""
    rows, n = scores.shape
    if rows == 0:
        return
    arguments: list[Tensor | int] = []
    for tensor in (scores, *others):
        assert tensor.stride(1) == 1 or tensor.shape[1] == 1, "neighbours in a row side by side"
        arguments += tensor, tensor.stride(0)
    largest, per_warp = next(sizes for length, *sizes in BLOCKS if length is None or n <= length)
    block = min(largest, max(WARP, triton.next_power_of_2(n + 1) // 2))  # not larger than n
    kernel[(rows,)](*arguments, n, **scale, BLOCK=block, num_warps=max(1, block // per_warp))


@triton.jit
def _row(pointer, stride):
    """The start of this program's row. Its offset has 64 bits, because a large batch has more than 2³¹ scores."""
    return pointer + tl.program_id(0).to(tl.int64) * stride


# A block that lies within its row needs no mask. Without one, each thread moves 16 bytes at a time for any n.
@triton.jit
def load_block(row, start, n, BLOCK: tl.constexpr):
    """BLOCK of the n numbers of a row, from `start` on, in fp32; zeros after its end."""
    columns = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:  # noqa: SIM108  as a statement it is a branch
        values = tl.load(row + columns)
    else:
        values = tl.load(row + columns, mask=columns < n, other=0.0)
    return values.to(tl.float32)


@triton.jit
def store_block(row, start, n, values, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    rounded = values.to(row.dtype.element_ty)
    if start + BLOCK <= n:
        tl.store(row + columns, rounded)
    else:
        tl.store(row + columns, rounded, mask=columns < n)


@triton.jit
def _over(numerator, r):
    """numerator / r, and 0 where r is 0."""
    return tl.where(r > 0, numerator / tl.where(r > 0, r, 1.0), 0.0)


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
def _norm_of_row(a, n, BLOCK: tl.constexpr):
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        scores = load_block(a, start, n, BLOCK)
        squares += scores * scores
    return tl.sqrt(tl.sum(squares))


@triton.jit
def _weights_of_row(a, factor, s, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        gelu, _ = _gelu(load_block(a, start, n, BLOCK) * factor)
        store_block(s, start, n, gelu, BLOCK)


@triton.jit
def _gradient_of_row(a, d, s, factor, n, BLOCK: tl.constexpr):
    """Replaces dS by D, writes S, and returns T."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        score = load_block(a, start, n, BLOCK)
        gelu, slope = _gelu(score * factor)
        g = load_block(d, start, n, BLOCK) * slope * factor
        total += g * score
        store_block(d, start, n, g, BLOCK)
        store_block(s, start, n, gelu, BLOCK)
    return tl.sum(total)


@triton.jit
def _couple_row(a, d, coupling, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        g = load_block(d, start, n, BLOCK) - load_block(a, start, n, BLOCK) * coupling
        store_block(d, start, n, g, BLOCK)


@triton.jit
def _norm(scores, a_stride, norms, r_stride, n, BLOCK: tl.constexpr):
    tl.store(_row(norms, r_stride), _norm_of_row(_row(scores, a_stride), n, BLOCK))


@triton.jit
def _weights(scores, a_stride, norms, r_stride, weights, s_stride, n, scale, BLOCK: tl.constexpr):
    factor = _over(scale, tl.load(_row(norms, r_stride)))
    _weights_of_row(_row(scores, a_stride), factor, _row(weights, s_stride), n, BLOCK)


@triton.jit
def _norm_and_weights(scores, a_stride, norms, r_stride, weights, s_stride, n, scale, BLOCK: tl.constexpr):
    a = _row(scores, a_stride)
    r = _norm_of_row(a, n, BLOCK)
    tl.store(_row(norms, r_stride), r)
    _weights_of_row(a, _over(scale, r), _row(weights, s_stride), n, BLOCK)


@triton.jit
def _backward(
    scores, a_stride, norms, r_stride, gradient, d_stride, weights, s_stride, totals, t_stride, n, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    a, d, s = _row(scores, a_stride), _row(gradient, d_stride), _row(weights, s_stride)
    factor = _over(scale, tl.load(_row(norms, r_stride)))
    tl.store(_row(totals, t_stride), _gradient_of_row(a, d, s, factor, n, BLOCK))


@triton.jit
def _backward_with_product(
    scores, a_stride, norms, r_stride, gradient, d_stride, weights, s_stride, totals, t_stride, products, p_stride, n,
    scale, BLOCK: tl.constexpr,
):  # fmt: skip
    a, d, s = _row(scores, a_stride), _row(gradient, d_stride), _row(weights, s_stride)
    factor = _over(scale, tl.load(_row(norms, r_stride)))
    total = tl.zeros((BLOCK,), tl.float32)
    product = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        score = load_block(a, start, n, BLOCK)
        gelu, slope = _gelu(score * factor)
        ds = load_block(d, start, n, BLOCK)
        g = ds * slope * factor
        total += g * score
        product += ds * gelu
        store_block(d, start, n, g, BLOCK)
        store_block(s, start, n, gelu, BLOCK)
    tl.store(_row(totals, t_stride), tl.sum(total))
    tl.store(_row(products, p_stride), tl.sum(product))


@triton.jit
def _couple(
    scores, a_stride, norms, r_stride, totals, t_stride, gradient, d_stride, n, BLOCK: tl.constexpr
):  # fmt: skip
    r = tl.load(_row(norms, r_stride))
    coupling = _over(tl.load(_row(totals, t_stride)), r * r)
    _couple_row(_row(scores, a_stride), _row(gradient, d_stride), coupling, n, BLOCK)


@triton.jit
def _backward_and_couple(
    scores, a_stride, norms, r_stride, gradient, d_stride, weights, s_stride, n, scale, BLOCK: tl.constexpr
):  # fmt: skip
    a, d, s = _row(scores, a_stride), _row(gradient, d_stride), _row(weights, s_stride)
    r = tl.load(_row(norms, r_stride))
    total = _gradient_of_row(a, d, s, _over(scale, r), n, BLOCK)
    # The second pass may read what another thread has written.
    tl.debug_barrier()
    _couple_row(a, d, _over(total, r * r), n, BLOCK)
