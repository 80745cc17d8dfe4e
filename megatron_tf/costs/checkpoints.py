"""Checkpoint size, and the interval between checkpoints that loses the least to failures.

Failures come at random with a mean time M between them; a checkpoint stops training for C. Young (1974, "A first order
approximation to the optimum checkpoint interval") gives √(2CM); Daly (2006, "A higher order estimate of the optimum
checkpoint interval for restart dumps", equation 37) corrects it for intervals that are no longer short compared with M.

The default failure rate is that of Llama 3's pre-training (arXiv:2407.21783, section 3.3.4): 419 unexpected
interruptions of 16,384 H100 in 54 days.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_tf.config.optimizers import DEFAULT, OPTIMIZERS
from megatron_tf.config.sections.model import Model
from megatron_tf.costs.estimate import num_parameters

LLAMA_3_FAILURES_PER_GPU_YEAR = 419 / (16384 * 54 / 365)
YEAR_SECONDS = 365 * 24 * 3600.0
COPY_BANDWIDTH = 10e9  # bytes/s from a rank's GPU to host memory; an asynchronous checkpoint waits only for this copy


def checkpoint_bytes(model: Model, optimizer: str = DEFAULT) -> int:
    """Bytes of the fp32 weights and of the states of `optimizer` (its name in the configuration). The rest of a
    checkpoint is small and not counted."""
    return (4 + OPTIMIZERS[optimizer].state_bytes) * num_parameters(model)


def mean_seconds_between_failures(failures_per_gpu_year: float, num_gpus: int) -> float:
    """Seconds between two failures of any of `num_gpus` GPUs, on average. Infinite for a rate of 0."""
    rate = failures_per_gpu_year * num_gpus
    return YEAR_SECONDS / rate if rate else math.inf


def young_interval(stall_seconds: float, mean_seconds: float) -> float:
    """Seconds of training between two checkpoints, to first order."""
    return math.sqrt(2 * stall_seconds * mean_seconds)


def daly_interval(stall_seconds: float, mean_seconds: float) -> float:
    """Seconds of training between two checkpoints, to higher order."""
    if stall_seconds >= 2 * mean_seconds:
        return mean_seconds
    ratio = stall_seconds / (2 * mean_seconds)
    return young_interval(stall_seconds, mean_seconds) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_seconds


def lost_share(interval: float, stall: float, write: float, restart: float, mean_seconds: float) -> float:
    """Share of the time (0 to 1) that is lost to checkpoints, repeated work and restarts. All arguments are in seconds.

    On average a failure costs half an interval, the training done while the last checkpoint was being written, and a
    restart.
    """
    share = stall / (interval + stall)
    if math.isfinite(mean_seconds):
        share += (interval / 2 + write + restart) / mean_seconds
    return min(1.0, share)


@dataclass(frozen=True)
class CheckpointPlan:
    """Checkpoints of a run: `bytes` on disk, times in seconds, shares of the whole time.

    `interval_steps`: the interval that loses least; None when there are no failures. With asynchronous checkpoints it
    lasts about `write` seconds or longer, because a save waits for the one before.
    """

    bytes: int
    write: float  # until a checkpoint is whole
    stall: float  # that training stands still for it
    mean_between_failures: float
    interval_steps: int | None
    lost_share: float  # at that interval
    configured_lost_share: float  # at the interval of the configuration


def plan_checkpoints(
    model: Model,
    num_writers: int,
    step_seconds: float,
    *,
    asynchronous: bool,
    configured_steps: int,
    failures_per_gpu_year: float,
    storage_bytes_per_second: float,
    restart_seconds: float,
    num_gpus: int,
    optimizer: str = DEFAULT,
) -> CheckpointPlan:
    """The plan with the interval that loses the least. `num_writers`: ranks that each write a part of the state."""
    size = checkpoint_bytes(model, optimizer)
    write = size / storage_bytes_per_second
    stall = min(write, size / num_writers / COPY_BANDWIDTH) if asynchronous else write
    mean = mean_seconds_between_failures(failures_per_gpu_year, num_gpus)

    def lost(steps: int) -> float:
        interval = steps * step_seconds
        if interval < write and asynchronous:  # a save waits for the one before
            return lost_share(interval, write - interval + stall, write, restart_seconds, mean)
        return lost_share(interval, stall, write if asynchronous else 0.0, restart_seconds, mean)

    steps = None
    if math.isfinite(mean):
        seconds = max(daly_interval(stall, mean), write if asynchronous else 0.0)
        steps = max(1, round(seconds / step_seconds))
    return CheckpointPlan(
        bytes=size,
        write=write,
        stall=stall,
        mean_between_failures=mean,
        interval_steps=steps,
        lost_share=0.0 if steps is None else lost(steps),
        configured_lost_share=lost(configured_steps),
    )
