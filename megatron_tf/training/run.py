"""The composition root: from a configuration to a trained model. Only here everything is known."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tf.checkpoint.architecture import stored_model
from megatron_tf.checkpoint.manager import Ranks
from megatron_tf.checkpoint.step_zero import state_bytes
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.optimizers import rule_of
from megatron_tf.config.schema import DataSource, RunConfig
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import BatchPlan, plan_batches, topology_for
from megatron_tf.costs.plan import describe, room_warning
from megatron_tf.data.documents import LossMask, find_boundaries
from megatron_tf.data.loader import Batch, BatchLoader, build_dataset, check_tokenizer, fingerprint, source_names
from megatron_tf.data.outlook import data_warnings, describe_passes, passes_over
from megatron_tf.data.prefetch import Prefetcher
from megatron_tf.diagnosis.run_facts import run_facts
from megatron_tf.durable import write_atomically
from megatron_tf.engine.base import Engine
from megatron_tf.engine.deepspeed.joining import join
from megatron_tf.errors import (
    ConfigError,
    DataError,
    LostContactError,
    RunStopped,
    TrainingError,
    UserError,
    system_reason,
)
from megatron_tf.inference.sharded import load_stage
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.precision import DTYPES
from megatron_tf.parallel.groups import Group, make_group
from megatron_tf.runtime.agreement import from_rank_zero, gather, together
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import NO_FACTS, leave
from megatron_tf.runtime.run_lock import locked
from megatron_tf.runtime.stop_signals import StopSignals
from megatron_tf.runtime.watchdog import Watchdog, watched
from megatron_tf.telemetry.console import Console
from megatron_tf.telemetry.trackers import open_trackers
from megatron_tf.training.account import account, earlier_settings, keep_config
from megatron_tf.training.growth_proof import Probe, compare, probe
from megatron_tf.training.health import HealthProbe
from megatron_tf.training.loop import Trainer
from megatron_tf.training.profiler import StepProfiler
from megatron_tf.training.saving import Saver
from megatron_tf.training.shared_folder import check_shared
from megatron_tf.training.start import Start, begin, checkpoints_folder, choose, first_stage_to_run


def train(stages: Sequence[RunConfig], environment: LaunchEnvironment, stop: StopSignals) -> None:
    """Trains, evaluates and saves as each of `stages` says, one after the other, resuming or growing where there is
    something to. A stage that is complete is passed over, so an interrupted chain goes on where it stopped.

    `stages` have passed `preflight`. RunStopped, on every rank, when `stop` asked for it. Raises UserError, on every
    rank alike, before anything is written, for whatever the user can correct.
    """
    rank, world_size = environment.rank, environment.world_size
    timeout = max(config.parallel.timeout_seconds for config in stages)
    hang_seconds = max(config.run.hang_seconds for config in stages)
    device = join(environment, timeout, facts=run_facts("train", stages) if world_size > 1 else NO_FACTS)
    try:
        with watched(rank, world_size, hang_seconds, Console(rank=rank)) as watchdog:
            first = from_rank_zero(lambda: first_stage_to_run(stages, world_size))
            together(lambda: _check_data(stages[first:]))
            for config in stages[first:]:
                _train(config, environment, device, stop, watchdog)
    except LostContactError:
        raise  # a rank is gone, and to leave the others in order could take for ever
    except (UserError, RunStopped):
        leave()  # all ranks are here; after any other error some may be in a collective, and waiting would hang
        raise
    leave()


def _train(
    config: RunConfig, environment: LaunchEnvironment, device: torch.device, stop: StopSignals, watchdog: Watchdog
) -> None:
    """One run, from its start to its last step."""
    world_size, is_main = environment.world_size, environment.rank == 0
    watchdog.report_to(Console(rank=environment.rank), Path(config.run.dir))
    watchdog.begin("opening the data")
    plan, topology = plan_batches(config, world_size), topology_for(config, world_size)
    boundaries = together(lambda: find_boundaries(config.data))
    training, validation = _loaders(config, plan, topology, environment.rank, boundaries.loss_mask)
    data_fingerprint = together(lambda: fingerprint(config.data.train, config.run.seed))
    # A lost rank is named before `closing`, which may take a while.
    with contextlib.ExitStack() as closing, watchdog.naming_the_lost():
        watchdog.begin("choosing a checkpoint")
        run_dir, restarted = Path(config.run.dir), environment.restarts > 0
        exists = from_rank_zero(run_dir.is_dir)
        if exists:  # before a checkpoint is chosen, which another run may be about to follow by a newer one
            together(lambda: _lock(config, closing, restarted) if is_main else None)
        path, passed_over = choose(config, Ranks(environment.rank, world_size, gather))
        start = together(lambda: begin(config, path, data_fingerprint))
        if not all(gather(start.grown_from is not None)):
            start = replace(start, grown_from=None)
        plan = plan_batches(config, world_size, start.progress.step, start.run_tokens,
                            start.run_state.get("schedule_unit"))  # fmt: skip
        if world_size > 1:
            check_shared(run_dir, is_main)
        earlier = from_rank_zero(lambda: earlier_settings(run_dir) if start.progress.step else None)
        told = account(config, start, world_size, earlier)
        config = told.config
        start = replace(start, run_state={**start.run_state, "history": told.history})
        together(lambda: _prepare_folder(config, run_dir) if is_main else None)
        if not exists:
            together(lambda: _lock(config, closing, restarted) if is_main else None)
        console = Console(rank=environment.rank, log_path=run_dir / "train.log")
        closing.callback(console.close)
        watchdog.report_to(console, run_dir, start.progress.step)
        for line in describe(config, world_size, plan, start.progress.step, told.origin).splitlines():
            console.info(line)
        for line in (*passed_over, *told.ineffective) if is_main else ():
            console.warning(line)
        for line in (start.description, *told.lines):
            console.info(line)
        if is_main:
            left = plan.train_steps - start.progress.step
            passes = passes_over(config, start.progress.samples + left * plan.global_batch_size)
            console.info(f"{'data':<7} {describe_passes(passes)}")
            free = shutil.disk_usage(checkpoints_folder(config)).free
            room = room_warning(config, left, state_bytes(config.model, rule_of(config.optimizer).state_names), free)
            for warning in [*data_warnings(config, passes), *([room] if room else [])]:
                console.warning(warning)
        if is_main and validation is not None:
            for name in _unseen_sources(config, validation, plan):
                console.warning(f"data.validation: none of the evaluated samples is of {name}, so it has no eval/loss/{name}. "
                                f"Raise evaluation.samples ({config.evaluation.samples}), or its weight.")  # fmt: skip

        tensor = make_group(topology, "tensor", config.parallel.timeout_seconds)
        engine, start = _build(config, plan, topology, tensor, start, validation or training, boundaries.ends, console,
                               device, watchdog)  # fmt: skip
        closing.callback(engine.close)
        watchdog.begin("opening the trackers")
        trackers = together(
            lambda: open_trackers(config, run_dir, start.progress.step, dict(start.trackers), is_main, console.warning)
        )
        closing.callback(trackers.close)
        token = from_rank_zero(lambda: secrets.token_hex(4))
        saver = Saver(config, engine, environment.rank, world_size, token, data_fingerprint,
                      start.growth_history, trackers, console, known_good=[path] if path else [])  # fmt: skip
        closing.callback(lambda: watchdog.begin("ending"))
        profiler = StepProfiler(config.training.profile, environment.rank, run_dir / "profile", engine.clock, console)
        closing.callback(profiler.finish)
        batches: BatchLoader | Prefetcher = training
        if engine.reads_data:
            batches = Prefetcher(training, plan.global_batch_size, device)
            closing.callback(batches.close)  # before "ending", while the time limit of a step holds
        health = _health_probe(config, engine, validation or training, start, topology, environment.rank)
        trainer = Trainer(config, plan, engine, batches, validation, saver, trackers, console, device, start, stop,
                          watchdog, profiler, health)  # fmt: skip
        try:
            trainer.fit()
        except TrainingError:  # on all ranks alike
            saver.finish()
            raise
        except RunStopped as stopped:
            console.info(str(stopped))
            raise
        except UserError as error:
            if not is_main:  # the others wait in a collective and cannot say it
                console.warning(str(error))
            raise
        watchdog.begin("ending")
        dist.barrier()
        watchdog.beat(trainer.progress.step)


def _check_data(stages: Sequence[RunConfig]) -> None:
    """DataError with all that is wrong with the data of all stages: what the last one lacks is said before the first."""
    problems = []
    for config in stages:
        data, model = config.data, config.model
        checks: list[Callable[[], object]] = [
            partial(find_boundaries, data),
            partial(check_tokenizer, (*data.train, *data.validation), data.tokenizer),
            *(
                partial(build_dataset, sources, model.seq_length, config.run.seed, model.vocab_size)
                for sources in (data.train, data.validation)
                if sources
            ),
        ]
        for check in checks:
            try:
                check()
            except DataError as error:
                problems += str(error).splitlines()
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))


def _loaders(
    config: RunConfig, plan: BatchPlan, topology: Topology, rank: int, loss_mask: LossMask | None
) -> tuple[BatchLoader, BatchLoader | None]:
    model, data = config.model, config.data

    def loader(sources: Sequence[DataSource]) -> BatchLoader:
        return BatchLoader(
            build_dataset(sources, model.seq_length, config.run.seed, model.vocab_size),
            micro_batch_size=plan.micro_batch_size, num_micro_batches=plan.num_micro_batches,
            data_rank=topology.coordinate("data", rank), data_size=topology.data, vocab_size=model.vocab_size,
            loss_mask=loss_mask,
        )  # fmt: skip

    together(lambda: check_tokenizer((*data.train, *data.validation), data.tokenizer))
    return together(lambda: loader(data.train)), together(lambda: loader(data.validation) if data.validation else None)


def _unseen_sources(config: RunConfig, validation: BatchLoader, plan: BatchPlan) -> list[str]:
    """Validation sources of which an evaluation takes no sample."""
    names, size = source_names(config.data.validation), plan.global_batch_size
    taken = -(-config.evaluation.samples // size) * size
    seen = {validation.dataset.locate(sample)[0] for sample in range(taken)}
    return [name for number, name in enumerate(names) if number not in seen]


def _lock(config: RunConfig, closing: contextlib.ExitStack, restarted: bool) -> None:
    """Takes the run's lock until `closing` ends. After a requeue a rank of the start before may live on, on a node that
    was cut off, until its watchdog ends it."""
    patience = min(config.run.hang_seconds + 60.0, config.parallel.timeout_seconds / 2) if restarted else 10.0
    try:
        closing.enter_context(locked(Path(config.run.dir), patience))
    except OSError as error:
        raise _cannot_write(config, error) from error


def _prepare_folder(config: RunConfig, run_dir: Path) -> None:
    """Makes the folders, and tries out, before hours are spent, that files can be written."""
    try:
        checkpoints_folder(config).mkdir(parents=True, exist_ok=True)
        attempt = checkpoints_folder(config) / f".tmp-can-write-{secrets.token_hex(4)}"
        write_atomically(attempt, b"checkpoints can be written here")
        attempt.unlink()
        keep_config(run_dir, config)
    except OSError as error:
        raise _cannot_write(config, error) from error


def _cannot_write(config: RunConfig, error: OSError) -> ConfigError:
    place = error.filename or config.run.dir
    return ConfigError(f"run.dir: cannot write to {place}: {system_reason(error, place)}. Choose another folder.")


def _build(
    config: RunConfig,
    plan: BatchPlan,
    topology: Topology,
    tensor: Group,
    start: Start,
    held_data: BatchLoader,
    ends: Sequence[int],
    console: Console,
    device: torch.device,
    watchdog: Watchdog,
) -> tuple[Engine, Start]:
    """The engine at its start. A growth is proved on a held batch first, and the proof goes into its history."""
    before: Probe | None = None
    held: list[Batch] = []
    if start.grown_from is not None:
        watchdog.begin("proving the growth, with the smaller model")
        held = together(lambda: list(held_data.step_batches(0)))
        smaller = load_stage(
            start.grown_from,
            stored_model(start.grown_from.index),
            topology,
            dist.get_rank(),
            TensorParallel(tensor, config.parallel.sequence),
            DTYPES[config.training.precision],
            device,
            ends,
        )
        before = probe(smaller, held)
        del smaller
    watchdog.begin("loading the weights")
    # imported here, because DeepSpeed takes seconds
    from megatron_tf.engine.deepspeed.engine import DeepSpeedEngine

    engine = DeepSpeedEngine(
        config, config.model, plan, topology, tensor, start.source, start.first_new(config.model), ends
    )
    engine.load_loss_scaler(dict(start.run_state))
    if before is not None:
        watchdog.begin("proving the growth, with the grown model")
        after = probe(engine.stage(), held)
        entry = start.growth_history[-1]
        console.info("growth: " + compare(before, after, config.training.precision, device, entry["preserves"]))
        entry = {**entry, "loss_before": before.loss, "loss_after": after.loss}
        start = replace(start, growth_history=(*start.growth_history[:-1], entry))
    return engine, start


def _health_probe(
    config: RunConfig, engine: Engine, data: BatchLoader, start: Start, topology: Topology, rank: int
) -> HealthProbe | None:
    measured = architecture_of(config.model).projections(config.model)
    if config.logging.health_interval_steps is None or not measured:
        return None
    held = BatchLoader(
        data.dataset, micro_batch_size=config.training.micro_batch_size, num_micro_batches=1, data_rank=0, data_size=1,
        vocab_size=config.model.vocab_size,
    )  # fmt: skip
    ids, _ = together(lambda: next(held.step_batches(0)))
    speaks = topology.coordinate("data", rank) == 0 and topology.coordinate("tensor", rank) == 0
    return HealthProbe(engine.stage(), ids, measured, start.old_tokens, speaks)
