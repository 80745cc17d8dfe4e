"""What the log says of a run before its first step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from megatron_tf.checkpoint.step_zero import state_bytes
from megatron_tf.config.optimizers import rule_of
from megatron_tf.costs.plan import describe, room_warning
from megatron_tf.training.opening import Opening
from megatron_tf.training.run_data import Loaders, RunData, unseen_sources
from megatron_tf.training.running import Run
from megatron_tf.training.start import Start, checkpoints_folder


def announce(opening: Opening, data: RunData, loaders: Loaders) -> None:
    """Model, layout, batches, length, memory, start and data, with what may be meant otherwise as warnings."""
    run, start, told = opening.run, opening.start, opening.told
    console = run.console
    plan = describe(run.config, run.world_size, run.plan.batches, start.progress.step, told.origin)
    for line in plan.splitlines():
        console.info(line)
    for line in (*opening.passed_over, *told.ineffective) if run.is_main else ():
        console.warning(line)
    for line in (start.description, *told.lines):
        console.info(line)
    if run.is_main:
        _announce_data(run, data, start)
        for warning in _validation_warnings(run, loaders):
            console.warning(warning)


def _announce_data(run: Run, data: RunData, start: Start) -> None:
    config, plan = run.config, run.plan.batches
    left = plan.train_steps - start.progress.step
    in_a_line, warnings = data.opened.outlook(start.progress.samples + left * plan.global_batch_size)
    run.console.info(f"{'data':<7} {in_a_line}")
    free = shutil.disk_usage(checkpoints_folder(config)).free
    room = room_warning(config, left, state_bytes(config.model, rule_of(config.optimizer).state_names), free)
    for warning in [*warnings, *([room] if room else [])]:
        run.console.warning(warning)


def _validation_warnings(run: Run, loaders: Loaders) -> Iterator[str]:
    if loaders.validation is None:
        return
    for name in unseen_sources(run, loaders.validation):
        yield (
            f"data.validation: none of the evaluated samples is of {name}, so it has no eval/loss/{name}. "
            f"Raise evaluation.samples ({run.config.evaluation.samples}), or its weight."
        )
