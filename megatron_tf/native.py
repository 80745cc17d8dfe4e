"""Whether kernels other than PyTorch's default ones may run: C and oneDNN on CPUs, Triton on GPUs."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from megatron_tf.caches import has_triton

CPUINFO = Path("/proc/cpuinfo")


def kernels_wanted() -> bool:
    """MEGATRON_TF_NATIVE=0 disables all of them. PyTorch's operators compute the same."""
    return os.environ.get("MEGATRON_TF_NATIVE") != "0"


def can_run_triton(device_type: str) -> bool:
    """Whether kernels in Triton can run on a device of this type."""
    return device_type == "cuda" and kernels_wanted() and has_triton()


@cache
def processor() -> dict[str, str]:
    """What Linux says about the first processor, by its names: "model name", "vendor_id", "flags" ... Else empty."""
    try:
        first = CPUINFO.read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    lines = [line.partition(":") for line in first.splitlines()]
    return {name.strip(): value.strip() for name, _, value in lines}


def is_amd() -> bool:
    """Whether Linux says that the processor is AMD's."""
    return processor().get("vendor_id") == "AuthenticAMD"
