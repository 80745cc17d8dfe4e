"""Products of fp32 matrices by oneDNN, which PyTorch contains, on AMD processors with AVX-512.

PyTorch's own products are MKL's, which use AVX2 there, at half the speed. On Intel's processors MKL is faster.
Compiled graphs keep MKL's products.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from megatron_tf.native import is_amd, kernels_wanted

# Of one product. The call takes about 10 µs longer than PyTorch's.
LEAST_MULTIPLICATIONS = 2**21
# oneDNN keeps a kernel for each shape that it has seen. Text of any length would fill the memory with them.
MULTIPLE_OF_ROWS = 32


def faster(left: Tensor, right: Tensor) -> bool:
    """Whether left [..., k] times right [k, n] should be oneDNN's. It depends on nothing but their shapes and types."""
    # first what is cheap, and what a compiled graph would otherwise be specialised for
    return (
        not torch.compiler.is_compiling()
        and left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and left.dim() > 1
        and left.numel() * right.shape[1] >= LEAST_MULTIPLICATIONS
        and _rows(left) % MULTIPLE_OF_ROWS == 0
        and not torch.is_autocast_enabled("cpu")
        and kernels_wanted()
        and mkl_is_slow()
    )


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left [..., k] times right [k, n] -> [..., n]. Not differentiable."""
    assert not torch.is_grad_enabled(), "the operator has no gradient"
    if not right.is_contiguous() and not right.mT.is_contiguous():
        # of a part of a matrix oneDNN multiplies number by number, a thousand times more slowly
        right = right.contiguous()
    return torch.ops.mkldnn._linear_pointwise(left, right.mT, None, "none", [], "")


def _rows(left: Tensor) -> int:
    """Positions: the rows in memory of a left factor, which may be the transpose of a matrix."""
    return left.shape[-1] if left.stride(-1) > left.stride(-2) else left.numel() // left.shape[-1]


@cache
def mkl_is_slow() -> bool:
    """Whether this processor is one of those above."""
    exists = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return exists and wide and is_amd()
