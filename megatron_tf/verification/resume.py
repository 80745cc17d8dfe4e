"""The proof of resuming: a run that changes its layout half way, against one process that never stops.

The model is trained under one layout, saved in the background while training goes on, and loaded under another layout
to be trained further. Compared are the saved and the loaded state, as logical tensors and to the last bit, and the
losses of both halves.
"""

from __future__ import annotations

import io
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.checkpoint.architecture import check_same_architecture
from megatron_tf.checkpoint.format import folder_name
from megatron_tf.checkpoint.kinds import CHECKPOINTS_FOLDER
from megatron_tf.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_tf.checkpoint.source import CheckpointSource
from megatron_tf.config.run_plan import BatchPlan, plan_batches, plan_run
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.engine.base import Age, Engine
from megatron_tf.engine.choice import build_engine
from megatron_tf.errors import ConfigError, exit_now
from megatron_tf.parallel.groups import make_group
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.ranges import clip_steps
from megatron_tf.state.sources import StateSource, initial_source
from megatron_tf.tasks.layers import example_batches
from megatron_tf.telemetry.console import Console
from megatron_tf.telemetry.trackers import Trackers
from megatron_tf.training.running import Run
from megatron_tf.training.start import Progress
from megatron_tf.verification.layout import (
    TIMEOUT_SECONDS,
    Layout,
    configured_boundaries,
    joined,
    layouts,
    reference,
    relative_error,
)

AXIS_SIZES = (1, 2, 4)
ENGINES = ("deepspeed", "torch")
_PAIRS_AT_ONCE = 25  # engines that the same processes build in turn; bounded, because DeepSpeed never frees its groups


@dataclass(frozen=True)
class Setting:
    """A layout under an engine; DeepSpeed with or without ZeRO."""

    layout: Layout
    zero_stage: int = 1
    engine: str = "deepspeed"

    @property
    def world_size(self) -> int:
        return self.layout.topology.world_size

    def __str__(self) -> str:
        return str(self.layout) + ("" if self.zero_stage else "+Z0") + (" torch" if self.engine == "torch" else "")

    def apply(self, config: RunConfig) -> RunConfig:
        """The same run under this setting."""
        zero = config.zero.model_copy(update={"stage": self.zero_stage})
        config = self.layout.apply(config)
        parallel = config.parallel.model_copy(update={"engine": self.engine})
        return config.model_copy(update={"zero": zero, "parallel": parallel})


@dataclass(frozen=True)
class Resumed:
    """One change of setting.

    `loss`: worst relative error of a step's loss against the uninterrupted run, before and after the change.
    `differing`: what was not equal to the last bit after saving or loading, such as "a.keys, exp_avg".
    """

    before: Setting
    after: Setting
    loss: float
    differing: tuple[str, ...]

    def agrees(self, tolerance: float) -> bool:
        return self.loss <= tolerance and not self.differing


def settings(config: RunConfig, num_ranks: int, engines: Sequence[str] = ENGINES) -> list[Setting]:
    """Every valid setting of `engines`, on 1 to `num_ranks` ranks with 1, 2 or 4 of them along each axis."""
    alone = Layout(Topology())
    # an engine may support layouts that the other does not
    by_engine = (layouts(Setting(alone, engine=engine).apply(config), num_ranks) for engine in engines)
    found = []
    for layout in (alone, *dict.fromkeys(itertools.chain.from_iterable(by_engine))):
        sizes = layout.topology
        if not all(size in AXIS_SIZES for size in (sizes.tensor, sizes.pipeline, sizes.data, sizes.context)):
            continue
        of_layout = (Setting(layout), Setting(layout, zero_stage=0), Setting(layout, engine="torch"))
        for setting in (setting for setting in of_layout if setting.engine in engines):
            try:
                validate(setting.apply(config), setting.world_size)
            except ConfigError:
                continue
            found.append(setting)
    return found


def rotation(found: Sequence[Setting]) -> list[tuple[Setting, Setting]]:
    """(before, after) pairs in which each setting comes once on each side; partners are far apart in the list."""
    return [(setting, found[(number + len(found) // 2) % len(found)]) for number, setting in enumerate(found)]


def check_resumes(config: RunConfig, pairs: Sequence[tuple[Setting, Setting]], steps: int) -> list[Resumed]:
    """Trains `steps` steps under the first setting of each pair and as many under the second, on ranks of this machine.

    Batches are random samples, so that no data are needed. Losses are compared with a run in fp32, whatever the
    precision of `config`.
    """
    expected = reference(config, 2 * steps).losses
    with tempfile.TemporaryDirectory() as folder:
        firsts = list(dict.fromkeys(before for before, _ in pairs))
        runs = {before: str(Path(folder, f"run{number}")) for number, before in enumerate(firsts)}
        saved = _spawn(config, steps, [(before, runs[before], None) for before in firsts])
        resumed = _spawn(config, steps, [(after, runs[before], steps) for before, after in pairs])
    results = []
    for (before, after), (losses, differing) in zip(pairs, resumed):
        first_losses, saved_differing = saved[firsts.index(before)]
        error = max(map(relative_error, [*first_losses, *losses], expected))
        results.append(Resumed(before, after, error, (*saved_differing, *differing)))
    return results


_Job = tuple[Setting, str, "int | None"]  # the setting, the run's folder, the step to resume at (None: start and save)
_Outcome = tuple[list[float], list[str]]  # losses, and what differed


def _spawn(config: RunConfig, steps: int, jobs: Sequence[_Job]) -> list[_Outcome]:
    """The outcomes of `jobs`, in order. Up to _PAIRS_AT_ONCE jobs of one world size share their processes."""
    outcomes: dict[int, _Outcome] = {}
    for world in sorted({setting.world_size for setting, *_ in jobs}):
        numbers = [number for number, (setting, *_) in enumerate(jobs) if setting.world_size == world]
        for start in range(0, len(numbers), _PAIRS_AT_ONCE):
            part = numbers[start : start + _PAIRS_AT_ONCE]
            with tempfile.TemporaryDirectory() as folder:
                of_part = [jobs[number] for number in part]
                start_ranks(_rank, world, config, steps, of_part, world, folder)
                outcomes.update(zip(part, json.loads(Path(folder, "outcomes.json").read_text())))
    return [outcomes[number] for number in range(len(jobs))]


def _rank(rank: int, config: RunConfig, steps: int, jobs: list[_Job], world: int, folder: str) -> None:
    with joined([setting.apply(config) for setting, *_ in jobs], rank, world, folder):
        under_deepspeed = any(setting.engine == "deepspeed" for setting, *_ in jobs)
        if under_deepspeed and config.training.precision == "fp16" and not torch.cuda.is_available():
            from megatron_tf.engine.deepspeed.patches import allow_fp16_on_cpu

            allow_fp16_on_cpu()
        outcomes = [_run(setting, config, rank, steps, run_dir, resume_at) for setting, run_dir, resume_at in jobs]
        if rank == 0:
            Path(folder, "outcomes.json").write_text(json.dumps(outcomes))
    exit_now()


def _run(setting: Setting, config: RunConfig, rank: int, steps: int, run_dir: str, resume_at: int | None) -> _Outcome:
    config = setting.apply(config)
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": run_dir})})
    plan, topology = plan_batches(config, setting.world_size), setting.layout.topology
    reader = None if resume_at is None else open_checkpoint(_checkpoint(run_dir, resume_at))
    source: StateSource = initial_source(config)
    if reader is not None:
        check_same_architecture(reader.index, config.model, config.optimizer.type)
        source = CheckpointSource(reader)
    group = make_group(topology, "tensor", TIMEOUT_SECONDS)
    ends = configured_boundaries(config).ends
    engine = build_engine(config, config.model, plan, topology, group, source, document_ends=ends)
    first = 0 if resume_at is None else resume_at
    differing = []
    if reader is not None:
        engine.load_loss_scaler(dict(reader.index.run))
        differing = _differences(_copy_of(engine), reader)
    data_rank = topology.coordinate("data", rank)

    def train(step: int) -> float:
        return float(engine.train_step(step, example_batches(config, plan, step, data_rank, topology.data)).loss)

    losses = [train(step) for step in range(first, first + steps)]
    if reader is None:
        differing = _save(config, plan, engine, rank, steps, lambda: train(steps))
    engine.close()
    return losses, differing


@dataclass(frozen=True)
class _State:
    """A rank's share of the state that a checkpoint stores exactly.

    `pieces`: (name, kind of state, start, stop, tensor), as ranges of the flat parameter. `ages`: (name, start, stop,
    updates).
    """

    pieces: list[tuple[str, str, int, int, Tensor]]
    ages: list[Age]
    loss_scaler: dict[str, Any]


def _copy_of(engine: Engine) -> _State:
    return _State(
        [(piece.name, piece.state, piece.start, piece.stop, piece.tensor.cpu().clone()) for piece in engine.pieces()],
        list(engine.ages()),
        engine.loss_scaler(),
    )


def _save(
    config: RunConfig, plan: BatchPlan, engine: Engine, rank: int, step: int, train_on: Callable[[], object]
) -> list[str]:
    """Saves in the background of one more step. Returns what differs between checkpoint and the state at the call."""
    from megatron_tf.training.saving import Saver

    careful = config.checkpoint.model_copy(update={"asynchronous": True, "on_failure": "stop", "keep_last": None})
    config = config.model_copy(update={"checkpoint": careful})
    console = Console(rank=rank, output=io.StringIO())
    device = next(engine.stage().parameters()).device
    run = Run(config, plan_run(config, dist.get_world_size()), rank, device, console)
    saver = Saver(run, engine, Trackers([], console.warning), token="check", data={})
    state = _copy_of(engine)
    saver.save(Progress(step, step * plan.global_batch_size, step * plan.tokens_per_step), engine.loss_scaler())
    train_on()
    saver.finish()
    return _differences(state, open_checkpoint(_checkpoint(config.run.dir, step)))


def _differences(state: _State, reader: CheckpointReader) -> list[str]:
    """What differs between the ranks' state and the checkpoint, in words; the same list on all ranks."""
    index = reader.index
    own = [
        f"{name}, {kind}"
        for name, kind, start, stop, tensor in state.pieces
        if not torch.equal(tensor, reader.read(name, kind, start, stop))
    ]
    own += [
        f"{name}, adam_steps"
        for name, start, stop, age in state.ages
        if clip_steps(index.adam_steps[name], start, stop) != [(start, stop, age)]
    ]
    own += [f"loss scaler, {key}" for key, value in state.loss_scaler.items() if index.run.get(key) != value]
    everyone: list[tuple[list[str], int]] = [([], 0)] * dist.get_world_size()
    dist.all_gather_object(everyone, (own, sum(len(tensor) for *_, tensor in state.pieces)))
    held, stored = sum(count for _, count in everyone), sum(t.numel * len(t.states) for t in index.tensors.values())
    problems = [] if held == stored else [f"{held:,} elements instead of {stored:,}"]
    return sorted({*problems, *(problem for own, _ in everyone for problem in own)})


def _checkpoint(run_dir: str, step: int) -> Path:
    return Path(run_dir, CHECKPOINTS_FOLDER, folder_name(step))
