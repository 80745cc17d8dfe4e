"""A description of a run without running it: plan, layout, memory, start and the first batch. Writes nothing and joins
no ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_tf.activations.forms import GPU
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.tasks import task_of
from megatron_tf.costs.plan import describe
from megatron_tf.durable import check_writable
from megatron_tf.errors import ConfigError
from megatron_tf.model.layers import task_layers
from megatron_tf.tasks.data import task_data
from megatron_tf.training.account import account, earlier_settings
from megatron_tf.training.announcement import lines_about
from megatron_tf.training.opening import without_source
from megatron_tf.training.run_data import check_data
from megatron_tf.training.start import begin, choose, first_stage_to_run


def dry_run(stages: Sequence[RunConfig], world_size: int) -> Iterator[str]:
    """Lines about each stage of `stages` that is not complete, as the log of the run begins; they have passed
    `preflight`.

    The first of these stages is opened as in a run: its data, and its checkpoint or source, with all checksums.
    UserError for what would stop the run there. Later stages grow from checkpoints that do not exist yet, so only their
    plans are shown.
    """
    first = first_stage_to_run(stages, world_size)
    yield from _first(stages[first], world_size)
    for config in stages[first + 1 :]:
        yield ""
        yield describe(config, world_size, device=_device())
    yield "dry run: nothing was written"


def _first(config: RunConfig, world_size: int) -> Iterator[str]:
    check_writable(ConfigError, Path(config.run.dir), "Choose another folder.", "run.dir")
    check_data([config])
    data = task_data(config.model).open(config)
    path, passed_over = choose(config)
    start = begin(config, path, data.fingerprint())
    if start.missing_source:
        start = without_source(config, start, start.missing_source)
    step = start.progress.step
    plan = start.plan(config, world_size)
    told = account(config, start, world_size, earlier_settings(Path(config.run.dir)) if step else None)
    for line in lines_about(plan, start, told, passed_over, data, _device()):
        yield f"warning: {line.text}" if line.is_warning else line.text
    loader = data.loader(
        config.data.train,
        micro_batch_size=plan.batches.micro_batch_size,
        num_micro_batches=plan.batches.num_micro_batches,
        data_size=plan.topology.data,
        training=True,
    )
    inputs, targets = next(loader.step_batches(start.progress.samples))
    count, most = task_layers(config.model).counts(targets).sum(), task_of(config.model).losses_per_sample(config.model)
    yield (
        f"{'batch':<7} micro batch of step {step + 1:,} on a rank: inputs {list(inputs.shape)}, targets "
        f"{list(targets.shape)}, {int(count):,} of {len(inputs) * most:,} losses count"
    )


def _device() -> str:
    """The type of device that a run would use here."""
    return GPU if torch.cuda.is_available() else "cpu"
