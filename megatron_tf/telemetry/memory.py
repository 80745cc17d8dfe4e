"""How much memory a process holds."""

from __future__ import annotations

import os

import torch


def memory_metric(device: torch.device) -> tuple[str, int]:
    """(metric's name, bytes): most that PyTorch has allocated on a GPU so far, or what the process holds in RAM now.

    On a CPU a training process keeps what it frees, so that this is near the most it has needed.
    """
    if device.type == "cuda":
        return "memory/gpu_peak_allocated_bytes", torch.cuda.max_memory_allocated(device)
    return "memory/cpu_resident_bytes", _resident_bytes()


def _resident_bytes() -> int:
    """0 where the system does not say it as Linux does."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
