"""The memory of a process."""

from __future__ import annotations

import os
import resource
import sys

import torch


def memory_metric(device: torch.device) -> tuple[str, int]:
    """(metric's name, bytes): most that PyTorch has allocated on a GPU so far, or what the process holds in RAM now.

    On a CPU a training process keeps what it frees, so that this is near the most it has needed.
    """
    if device.type == "cuda":
        return "memory/gpu_peak_allocated_bytes", torch.cuda.max_memory_allocated(device)
    return "memory/cpu_resident_bytes", resident_bytes()


def resident_bytes() -> int:
    """Of this process in RAM, mapped pages of files included; the most so far where only Linux would say it."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most that this process has held in RAM so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
