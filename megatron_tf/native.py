"""Whether this package's own kernels may run: those in C for CPUs, and those in Triton for GPUs."""

from __future__ import annotations

import os

from megatron_tf.caches import has_triton


def kernels_wanted() -> bool:
    """MEGATRON_TF_NATIVE=0 disables all of them. PyTorch's operators compute the same."""
    return os.environ.get("MEGATRON_TF_NATIVE") != "0"


def can_run_triton(device_type: str) -> bool:
    """Whether kernels in Triton can run on a device of this type."""
    return device_type == "cuda" and kernels_wanted() and has_triton()
