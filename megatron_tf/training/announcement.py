"""The lines of the log before the first step of a run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from megatron_tf.checkpoint.step_zero import checkpoint_bytes
from megatron_tf.config.optimizers import rule_of
from megatron_tf.config.run_plan import RunPlan, below_trained
from megatron_tf.config.schema import RunConfig
from megatron_tf.costs.plan import describe, room_warning
from megatron_tf.growth.width import alike
from megatron_tf.tasks.data import OpenData
from megatron_tf.training.account import Account
from megatron_tf.training.opening import Opening
from megatron_tf.training.run_data import Loaders, unseen_sources
from megatron_tf.training.running import Run
from megatron_tf.training.start import Start, checkpoints_folder


class Line(NamedTuple):
    text: str
    is_warning: bool = False


def announce(opening: Opening, loaders: Loaders) -> None:
    """Writes a description of the run, and warnings of likely mistakes, to the log of the first rank."""
    run, start = opening.run, opening.start
    if not run.is_main:
        return
    lines = lines_about(run.plan, start, opening.told, opening.passed_over, loaders.data, run.device.type)
    for line in lines:
        (run.console.warning if line.is_warning else run.console.info)(line.text)
    for warning in (*_room_warnings(run, start), *_validation_warnings(run, loaders)):
        run.console.warning(warning)


def lines_about(
    plan: RunPlan, start: Start, told: Account, passed_over: Sequence[str], data: OpenData, device: str
) -> Iterator[Line]:
    """Model, layout, batches, length and memory of a run; where it begins; its data.

    `told`: see `account`.  `passed_over`: checkpoints that could not be used, with reasons.  `device`: its type.
    """
    step, batches = start.progress.step, plan.batches
    for text in describe(told.config, plan.topology.world_size, batches, step, told.origin, device).splitlines():
        yield Line(text)
    doubts = *_shorter_than_trained(told.config, start), *_clones_alike(start), *_not_proved(start)
    for text in (*passed_over, *told.ineffective, *doubts):
        yield Line(text, is_warning=True)
    for text in (start.description, *told.lines):
        yield Line(text)
    left = batches.train_steps - step
    in_a_line, warnings = data.outlook(start.progress.samples + left * batches.global_batch_size)
    yield Line(f"{'data':<7} {in_a_line}")
    for text in warnings:
        yield Line(text, is_warning=True)


def _shorter_than_trained(config: RunConfig, start: Start) -> Iterator[str]:
    """A warning of a length that is below the steps trained already. Less than a step is rounding."""
    training, length = config.training, config.model.seq_length
    for key, asked, trained, a_step in (
        ("train_steps", training.train_steps, start.progress.step, 1),
        ("train_samples", training.train_samples, start.run_tokens // length, training.global_batch_size),
        ("train_tokens", training.train_tokens, start.run_tokens, training.global_batch_size * length),
    ):
        if asked is None or trained - asked < a_step:
            continue
        yield below_trained(f"training.{key}", asked, trained)


def _not_proved(start: Start) -> Iterator[str]:
    """A warning for a run that begins with a growth that a tool has done, if the smaller model is not there."""
    if start.missing_source:
        yield (
            f"growth: is not proved, because {start.missing_source}. Restore it at that path before the first step to "
            "have it proved"
        )


def _clones_alike(start: Start) -> Iterator[str]:
    """A warning for a run that begins with a growth of the width; a resumed run has had it already."""
    width = start.growth_history[-1].get("width") if start.growth_history and not start.resumed else None
    if width is not None and (warning := alike(width)) is not None:
        yield f"{warning}. Leave the key out, or give it a share such as 0.1"


def _room_warnings(run: Run, start: Start) -> Iterator[str]:
    place = checkpoints_folder(run.config)  # the first save makes it, unless the user has put it on another disk
    free = shutil.disk_usage(place if place.exists() else run.folder).free
    size = checkpoint_bytes(run.config.model, rule_of(run.config.optimizer).state_names)
    warning = room_warning(run.config, run.plan.batches.train_steps - start.progress.step, size, free)
    if warning:
        yield warning


def _validation_warnings(run: Run, loaders: Loaders) -> Iterator[str]:
    if loaders.validation is None:
        return
    for name in unseen_sources(run, loaders.validation):
        yield (
            f"data.validation: none of the evaluated samples is of {name}, so it has no eval/loss/{name}. "
            f"Raise evaluation.samples ({run.config.evaluation.samples}), or its weight."
        )
