"""The composition root: from a configuration to a trained model. Only this module sees all parts."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tf.config.schema import RunConfig
from megatron_tf.diagnosis.run_facts import run_facts
from megatron_tf.engine.base import Engine
from megatron_tf.engine.choice import join
from megatron_tf.errors import DivergedError, RunStopped, TrainingError, UserError
from megatron_tf.runtime.agreement import from_rank_zero, together
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import NO_FACTS
from megatron_tf.runtime.session import session
from megatron_tf.runtime.stop_signals import StopSignals
from megatron_tf.runtime.watchdog import Watchdog
from megatron_tf.telemetry.console import Console
from megatron_tf.telemetry.trackers import Trackers, open_trackers
from megatron_tf.training.announcement import announce
from megatron_tf.training.loop import Trainer
from megatron_tf.training.opening import Opening, open_run
from megatron_tf.training.run_data import RunData, check_data, open_data, open_loaders
from megatron_tf.training.running import Run
from megatron_tf.training.saving import Saver
from megatron_tf.training.start import Start, first_stage_to_run
from megatron_tf.training.start_engine import start_engine


def train(stages: Sequence[RunConfig], environment: LaunchEnvironment, stop: StopSignals) -> None:
    """Trains, evaluates and saves as each of `stages` says, one after another. Each resumes from its own checkpoint or
    grows from the stage before. Complete stages are passed over, so an interrupted chain goes on where it stopped.

    `stages` have passed `preflight`. RunStopped, on every rank, when `stop` asked for it. Raises UserError, on every
    rank and before anything is written, for what the user can correct.
    """
    world_size = environment.world_size
    timeout = max(config.parallel.timeout_seconds for config in stages)
    hang_seconds = max(config.run.hang_seconds for config in stages)
    device = join(stages, environment, timeout, facts=run_facts("train", stages) if world_size > 1 else NO_FACTS)
    with session(environment, hang_seconds) as watchdog:
        first = from_rank_zero(lambda: first_stage_to_run(stages, world_size))
        together(lambda: check_data(stages[first:]))
        for config in stages[first:]:
            _train(config, environment, device, stop, watchdog)


def _train(
    config: RunConfig, environment: LaunchEnvironment, device: torch.device, stop: StopSignals, watchdog: Watchdog
) -> None:
    """One run, from its start to its last step."""
    stop.begin_run()
    watchdog.report_to(Console(rank=environment.rank), Path(config.run.dir))
    watchdog.begin("opening the data")
    data = open_data(config)
    # A lost rank is named before `closing`, which may take a while.
    with contextlib.ExitStack() as closing, watchdog.naming_the_lost():
        watchdog.begin("choosing a checkpoint")
        opening = open_run(config, environment, device, data.fingerprint, closing)
        run = opening.run
        watchdog.report_to(run.console, run.folder, opening.start.progress.step)
        loaders = open_loaders(run, data)
        announce(opening, loaders)
        engine, start = start_engine(run, opening.start, loaders, watchdog)
        closing.callback(engine.close)
        watchdog.begin("opening the trackers")
        trackers = _trackers(run, start)
        closing.callback(trackers.close)
        saver = _saver(opening, start, engine, trackers, data)
        trainer = Trainer(run, engine, loaders, start, saver, trackers, stop, watchdog)
        closing.callback(trainer.close)
        _fit(trainer)
        watchdog.begin("ending")
        dist.barrier()
        watchdog.beat(trainer.progress.step)


def _trackers(run: Run, start: Start) -> Trackers:
    step, ids = start.progress.step, dict(start.trackers)
    trackers = together(lambda: open_trackers(run.config, run.folder, step, ids, run.is_main, run.console.warning))
    for place in trackers.places:
        run.console.info(f"{'tracker':<7} {place}")
    return trackers


def _saver(opening: Opening, start: Start, engine: Engine, trackers: Trackers, data: RunData) -> Saver:
    return Saver(
        opening.run,
        engine,
        trackers,
        token=from_rank_zero(lambda: secrets.token_hex(4)),
        data=data.fingerprint,
        growth_history=start.growth_history,
        known_good=[opening.path] if opening.path else [],
    )


def _fit(trainer: Trainer) -> None:
    """Trains to the end. An error of one rank alone is written to that rank's log before it is raised."""
    try:
        trainer.fit()
    except TrainingError as error:
        if isinstance(error, DivergedError):
            trainer.note_divergence()
        # raised on all ranks, so all of them can wait for the save
        trainer.saver.finish()
        raise
    except RunStopped as stopped:
        trainer.run.console.info(str(stopped))
        raise
    except UserError as error:
        if not trainer.run.is_main:
            # the others wait in a collective and cannot report it
            trainer.run.console.warning(str(error))
        raise
