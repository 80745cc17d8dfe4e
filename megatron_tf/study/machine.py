"""How many runs of a study a machine does at once. Each has cores of its own, and GPUs too unless they are shared."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from megatron_tf.errors import UserError
from megatron_tf.telemetry.text import are, count_of


@dataclass(frozen=True)
class Share:
    """`workers`: runs at a time.  `threads`: of each process of a run.
    `devices`: CUDA_VISIBLE_DEVICES of each worker; empty on a machine without GPUs.
    """

    workers: int
    threads: int
    devices: tuple[str, ...] = ()


def share(ranks: int, workers: int | None) -> Share:
    """The share of each of `workers` when a run has `ranks` processes. `workers` None: as many as there is room for.

    More runs of one process than GPUs share these, up to one a core, because a small model leaves a GPU idle most of
    the time. UserError when there are too few GPUs, or cores on a machine without GPUs.
    """
    cores, gpus = _cores(), _gpus()
    shared = ranks == 1 and workers is not None and workers > len(gpus)
    room, unit = (len(gpus), "GPU") if gpus and not shared else (cores, "core")
    if ranks * (workers or 1) > room:
        if workers is None or ranks > room:
            key, remedy = "ranks", "Set it to less, or take a larger machine."
        else:
            key, remedy = "--workers", f"Give at most {room // ranks}."
        raise UserError(
            f"{key}: {count_of(ranks * (workers or 1), unit)} for {count_of(workers or 1, 'run')} of "
            f"{count_of(ranks, 'process')} at once, and there {are(room)} {room} here. {remedy}"
        )
    workers = workers or room // ranks
    devices: tuple[str, ...] = ()
    if gpus:
        in_turn = [gpus[place % len(gpus)] for place in range(workers * ranks)]
        devices = tuple(",".join(in_turn[first : first + ranks]) for first in range(0, len(in_turn), ranks))
    return Share(workers, threads(ranks, workers), devices)


def room_for(ranks: int) -> int:
    """How many runs of `ranks` processes this machine does at once; 1 for runs that are too large for it."""
    return max(1, (len(_gpus()) or _cores()) // ranks)


def threads(ranks: int, workers: int) -> int:
    """Threads of each process of a run when `workers` runs share this machine's cores."""
    return max(1, _cores() // (workers * ranks))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _gpus() -> list[str]:
    """The names of the GPUs, as in CUDA_VISIBLE_DEVICES."""
    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
