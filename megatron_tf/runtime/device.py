"""The device of a rank."""

from __future__ import annotations

import torch


def missing_gpu(local_rank: int) -> str | None:
    """A sentence when this machine has GPUs, but none with the number `local_rank`; else None."""
    if not torch.cuda.is_available() or local_rank < torch.cuda.device_count():
        return None
    return f"local rank {local_rank} has no GPU: this node shows {torch.cuda.device_count()}"


def choose_device(local_rank: int) -> torch.device:
    """This rank's GPU, which becomes the current one, or the CPU of a machine without GPUs.

    IndexError when there are GPUs, but none for this rank.
    """
    if problem := missing_gpu(local_rank):
        raise IndexError(problem)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
