"""How many runs of a study a machine does at once: each has cores of its own, and GPUs unless more are asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from megatron_tf.errors import UserError


@dataclass(frozen=True)
class Share:
    """`devices`: CUDA_VISIBLE_DEVICES of each worker; empty on a machine without GPUs."""

    workers: int
    threads: int
    devices: tuple[str, ...] = ()


def share(ranks: int, workers: int | None) -> Share:
    """What each of `workers` gets (None: as many as there is room for), when a run has `ranks` processes.

    Runs of one process may share GPUs, as many as there are cores: a small model leaves a GPU waiting for the host most
    of the time. UserError when the machine has not as many cores, or GPUs where there are any.
    """
    cores, gpus = len(os.sched_getaffinity(0)), _gpus()
    shared = ranks == 1 and workers is not None and workers > len(gpus)
    room, unit = (len(gpus), "GPUs") if gpus and not shared else (cores, "cores")
    if ranks * (workers or 1) > room:
        remedy = f"Give at most {room // ranks}." if ranks <= room else "Set ranks to less, or take a larger machine."
        raise UserError(
            f"--workers: {workers or 1} runs of {ranks} processes need {ranks * (workers or 1)} {unit}, and here are "
            f"{room}. "
            f"{remedy}"
        )
    workers = workers or room // ranks
    devices: tuple[str, ...] = ()
    if gpus:
        in_turn = [gpus[place % len(gpus)] for place in range(workers * ranks)]
        devices = tuple(",".join(in_turn[first : first + ranks]) for first in range(0, len(in_turn), ranks))
    return Share(workers, max(1, cores // (workers * ranks)), devices)


def _gpus() -> list[str]:
    """Their names, as CUDA_VISIBLE_DEVICES has them."""
    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
