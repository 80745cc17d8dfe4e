"""The learning rate as a pure function of the step; nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megatron_tf.config.schema import Optimizer


def learning_rate(step: int, optimizer: Optimizer, train_steps: int) -> float:
    """Learning rate of update `step` (0-based) of `train_steps`.

    Linear from 0 over `warmup_steps`, so that the first update has rate 0 when there is a warm-up; then
    cosine to `min_lr` at step `train_steps`, or constant.
    """
    schedule = optimizer.schedule
    if step <= schedule.warmup_steps and schedule.warmup_steps > 0:
        return optimizer.lr * step / schedule.warmup_steps
    if schedule.type == "constant":
        return optimizer.lr
    progress = min(1.0, (step - schedule.warmup_steps) / max(1, train_steps - schedule.warmup_steps))
    return schedule.min_lr + (optimizer.lr - schedule.min_lr) / 2 * (1 + math.cos(math.pi * progress))
