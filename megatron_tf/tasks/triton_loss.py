"""The passes of the loss over the logits on GPUs. tasks.classes has the formulas, and does the same in PyTorch.

Each row is one program. The forward pass reads the logits once, the backward pass reads and writes them once.
Arithmetic is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 4096  # columns
WARPS = 8


def sums(rows: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(max, Σ exp(z − max), z[local]) of each row, fp32 [n] each; 0 for the last where `local` is -1.

    rows [n, C/T], each row contiguous; local int64 [n].
    """
    top, total, target = (rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(3))
    if rows.shape[0]:
        _sums[(rows.shape[0],)](
            rows, rows.stride(0), local, top, total, target, rows.shape[1], BLOCK=BLOCK, num_warps=WARPS
        )
    return top, total, target


def gradient(rows: Tensor, local: Tensor, log_total: Tensor, scale: Tensor) -> Tensor:
    """(softmax − onehot(local)) · scale: [n, C/T] in the type of `rows`; log_total and scale fp32 [n]."""
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if rows.shape[0]:
        _gradient[(rows.shape[0],)](
            rows,
            rows.stride(0),
            local,
            log_total,
            scale,
            out,
            out.stride(0),
            rows.shape[1],
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out


@triton.jit
def _sums(rows, stride, local, top, total, target, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z = rows + row * stride
    # Each lane keeps the largest of its own columns. It does not begin with -inf, because -inf − -inf is NaN.
    largest = tl.full((BLOCK,), -3.0e38, tl.float32)
    lanes = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(z + columns, mask=columns < n, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, values)
        lanes = lanes * tl.exp(largest - larger) + tl.exp(values - larger)
        largest = larger
    highest = tl.max(largest)
    tl.store(top + row, highest)
    tl.store(total + row, tl.sum(lanes * tl.exp(largest - highest)))
    label = tl.load(local + row)
    tl.store(target + row, tl.load(z + label, mask=label >= 0, other=0.0).to(tl.float32))


@triton.jit
def _gradient(rows, stride, local, log_total, scale, out, out_stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z, d = rows + row * stride, out + row * out_stride
    label, shift, factor = tl.load(local + row), tl.load(log_total + row), tl.load(scale + row)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(z + columns, mask=columns < n, other=float("-inf")).to(tl.float32)
        softmax = tl.exp(values - shift)
        g = (softmax - tl.where(columns == label, 1.0, 0.0)) * factor
        tl.store(d + columns, g.to(d.dtype.element_ty), mask=columns < n)
