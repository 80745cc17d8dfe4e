"""Rules of the learning rate's schedule and the length of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_tf.config.rules.batch import length_problems
from megatron_tf.config.run_plan import steps_to_train
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import LearningRates
from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.telemetry.text import count_of


def schedule_problems(config: RunConfig) -> Iterator[str]:
    schedule = config.optimizer.schedule
    steps = None if list(length_problems(config)) else steps_to_train(config)
    yield from rate_problems(config.optimizer, steps)
    if config.checkpoint.keep_before_decay and schedule.type != "wsd":
        yield (
            f"checkpoint.keep_before_decay: true is for schedule type wsd only, but optimizer.schedule.type is "
            f"{schedule.type}. Set it to false, or the type to wsd."
        )
    if steps is not None and config.growth is not None:
        yield from _new_tokens_problems(config.growth.lr_multipliers, steps)


def rate_problems(optimizer: Optimizer, steps: int | None) -> Iterator[str]:
    """Sentences on the schedule of a run of `steps` steps, of pretraining or fine-tuning; None: they are not known."""
    schedule, lr = optimizer.schedule, optimizer.lr
    if schedule.min_lr > lr:
        yield (
            f"optimizer.schedule.min_lr: {schedule.min_lr:g} is above optimizer.lr {lr:g}. Set it to at most {lr:g}."
        )
    if steps is None:
        return
    if schedule.warmup_steps > steps:
        yield (
            f"optimizer.schedule.warmup_steps: {schedule.warmup_steps} is more than the run's "
            f"{count_of(steps, 'step')}. Set it to at most {steps}; 1 % would be {math.ceil(steps / 100)}."
        )
    if schedule.type != "wsd" and schedule.decay_shape != "linear":
        yield (
            f"optimizer.schedule.decay_shape: {schedule.decay_shape} is for schedule type wsd only, but "
            f"optimizer.schedule.type is {schedule.type}. Remove it, or set the type to wsd."
        )
    if schedule.type != "wsd":
        if schedule.decay_steps is not None:
            yield (
                f"optimizer.schedule.decay_steps: {schedule.decay_steps} is for schedule type wsd only, but "
                f"optimizer.schedule.type is {schedule.type}. Remove it, or set the type to wsd."
            )
    elif schedule.decay_steps is None:
        yield (
            "optimizer.schedule.decay_steps: wsd needs the number of its last, decaying steps. "
            f"Give it; 10 % would be {math.ceil(steps / 10)}."
        )
    elif schedule.warmup_steps + schedule.decay_steps > steps:
        left = steps - schedule.warmup_steps
        way = f"decay_steps to at most {left}" if left > 0 else "both to less"
        yield (
            f"optimizer.schedule.decay_steps: {schedule.decay_steps} and optimizer.schedule.warmup_steps "
            f"{schedule.warmup_steps} are together more than the run's {count_of(steps, 'step')}. Set {way}."
        )


def _new_tokens_problems(rates: LearningRates, steps: int) -> Iterator[str]:
    """`steps`: length of the run."""
    decay, key = rates.new_tokens_decay_steps, "growth.lr_multipliers.new_tokens_decay_steps"
    if decay is None:
        if rates.new_tokens_decay_shape != "linear":
            yield (
                f"growth.lr_multipliers.new_tokens_decay_shape: {rates.new_tokens_decay_shape} says how "
                "growth.lr_multipliers.new_tokens goes to 1, but new_tokens_decay_steps is not given. Give it, or "
                "remove the shape."
            )
    elif rates.new_tokens == 1:
        yield (
            f"{key}: {decay}, but growth.lr_multipliers.new_tokens is 1 already. Set new_tokens to what it begins "
            "with, such as 4, or remove new_tokens_decay_steps."
        )
    elif decay > steps:
        yield f"{key}: {decay} is more than the run's {count_of(steps, 'step')}. Set it to at most {steps}."
