"""Products of fp32 matrices by oneDNN, which is a part of PyTorch, on AMD processors with AVX-512.

PyTorch's own products are MKL's, which use AVX2 there, at half the speed. On processors of Intel MKL is the faster one.
The operator is the one that torch.compile takes for linear layers on CPUs. It has no gradient.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from megatron_tf.native import kernels_wanted, processor

# Of one product. The call takes about 10 µs longer than PyTorch's.
LEAST_MULTIPLICATIONS = 2**21


def faster(left: Tensor, right: Tensor) -> bool:
    """Whether left [..., k] times right [k, n] is faster than PyTorch's product."""
    return (
        left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and left.numel() * right.shape[1] >= LEAST_MULTIPLICATIONS
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and kernels_wanted()
        and is_faster_here()
    )


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left [..., k] times right [k, n] -> [..., n]. Not differentiable."""
    assert not torch.is_grad_enabled(), "the operator has no gradient"
    return torch.ops.mkldnn._linear_pointwise(left, right.mT, None, "none", [], "")


@cache
def is_faster_here() -> bool:
    """Whether this processor is one of those above."""
    exists = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return exists and wide and processor().get("vendor_id") == "AuthenticAMD"
