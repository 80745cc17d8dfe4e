"""The learning rate as a pure function of the step; nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megatron_tf.config.run_plan import BatchPlan
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.optimizer import Optimizer, Schedule


def learning_rate(step: float, optimizer: Optimizer, train_steps: float) -> float:
    """Learning rate of update `step` (0-based) of `train_steps`, before any multiplier of a group of parameters.

    Linear from 0 over `warmup_steps`, so that the first update has rate 0 when there is a warm-up; then
        constant: `lr`;
        cosine:   half a cosine from `lr` to `min_lr` at step `train_steps`;
        wsd:      `lr`, and over the last `decay_steps` to `min_lr` at step `train_steps`: linear, or as 1 - √(their
        share).
    Steps count from the beginning of the run, so a growth warms up afresh.
    """
    schedule = optimizer.schedule
    if step <= schedule.warmup_steps and schedule.warmup_steps > 0:
        return optimizer.lr * step / schedule.warmup_steps
    if schedule.type == "constant":
        return optimizer.lr
    falling = train_steps - schedule.warmup_steps if schedule.type == "cosine" else schedule.decay_steps
    left = min(1.0, max(0.0, train_steps - step) / max(1, falling or 0))  # share of the fall still to come
    share = left
    if schedule.type == "cosine":
        share = (1 - math.cos(math.pi * left)) / 2
    elif schedule.decay_shape == "sqrt":
        share = 1 - math.sqrt(1 - left)
    return schedule.min_lr + (optimizer.lr - schedule.min_lr) * share


def new_tokens_factor(step: float, growth: Growth | None) -> float:
    """Factor of the learning rate of the tokens that the run's growth added, at update `step` (0-based) since then.

    It is f = `growth.lr_multipliers.new_tokens`. With N = `new_tokens_decay_steps` it goes to 1, and stays from N on:
    1 + (f - 1)(1 - step/N), or as half a cosine.
    """
    if growth is None:
        return 1.0
    rates = growth.lr_multipliers
    if rates.new_tokens_decay_steps is None:
        return rates.new_tokens
    # share of the decay still to come
    left = max(0.0, 1 - step / rates.new_tokens_decay_steps)
    if rates.new_tokens_decay_shape == "cosine":
        left = (1 - math.cos(math.pi * left)) / 2
    return 1 + (rates.new_tokens - 1) * left


def decay_step(schedule: Schedule, plan: BatchPlan) -> int | None:
    """The number of updates before the decay of a wsd schedule begins; None without a decay."""
    if schedule.type != "wsd" or schedule.decay_steps is None:
        return None
    first, position = plan.schedule_from
    return first + math.ceil((plan.schedule_steps - schedule.decay_steps - position) / plan.schedule_pace)
