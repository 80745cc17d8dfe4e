"""The opening of a run: its folder is locked, its start chosen, its plan made, its log begun."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_tf.checkpoint.manager import Ranks, find_latest
from megatron_tf.config.schema import RunConfig
from megatron_tf.errors import ConfigError
from megatron_tf.runtime.agreement import from_rank_zero, gather, together
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.run_folder import PATIENCE_SECONDS, RunFolder
from megatron_tf.telemetry.console import Console
from megatron_tf.training.account import Account, account, earlier_settings, keep_config
from megatron_tf.training.fitted_routers import fits_routers
from megatron_tf.training.running import Run
from megatron_tf.training.shared_folder import check_shared
from megatron_tf.training.start import Start, begin, checkpoints_folder, choose


@dataclass(frozen=True)
class Opening:
    """A run and its start.

    `path`: the checkpoint to start from, with verified checksums; None: initial weights.
    `passed_over`: checkpoints that could not be used, with reasons.  `told`: its account, see `account`.
    """

    run: Run
    start: Start
    path: Path | None
    passed_over: list[str]
    told: Account


def open_run(
    config: RunConfig,
    environment: LaunchEnvironment,
    device: torch.device,
    data: Mapping[str, Any],
    closing: contextlib.ExitStack,
) -> Opening:
    """All ranks call it together. `data`: fingerprint of the training data. `closing` unlocks the folder at its end.

    Raises UserError, on every rank, for what the user can correct.
    """
    world_size, is_main = environment.world_size, environment.rank == 0
    path_of_run = Path(config.run.dir)
    folder = together(lambda: RunFolder(path_of_run, closing, _patience(config, environment)) if is_main else None)
    path, passed_over = choose(config, Ranks(environment.rank, world_size, gather))
    start = together(lambda: begin(config, path, data))
    if missing := [reason for reason in gather(start.missing_source) if reason]:
        start = without_source(config, start, missing[0])
    plan = start.plan(config, world_size)
    if world_size > 1:
        check_shared(path_of_run, is_main)
    earlier = from_rank_zero(lambda: earlier_settings(path_of_run) if start.progress.step else None)
    told = account(config, start, world_size, earlier)
    start = replace(start, run_state={**start.run_state, "history": told.history})
    together(lambda: _prepare(folder, told.config) if folder else None)
    console = Console(rank=environment.rank, log_path=path_of_run / "train.log")
    closing.callback(console.close)
    return Opening(Run(told.config, plan, environment.rank, device, console), start, path, passed_over, told)


def without_source(config: RunConfig, start: Start, why: str) -> Start:
    """`start` of a growth that cannot be proved, because of `why`. ConfigError when it needs the smaller model."""
    start = replace(start, grown_from=None, missing_source=why)
    if fits_routers(config, start):
        raise ConfigError(
            f"growth.routers: clusters fits the routers of the split to what the smaller model does, and {why}. "
            "Restore it at that path, or set growth.routers to random, with which the growth is not proved."
        )
    return start


def _patience(config: RunConfig, environment: LaunchEnvironment) -> float:
    """Seconds to wait for the lock of the run's folder.

    After a SLURM requeue, ranks of the previous start can survive on an unreachable node until their watchdog fires;
    wait longer for them.
    """
    if environment.restarts == 0:
        return PATIENCE_SECONDS
    return min(config.run.hang_seconds + 60.0, config.parallel.timeout_seconds / 2)


def _prepare(folder: RunFolder, config: RunConfig) -> None:
    """Makes the folder and keeps the configuration."""
    checkpoints = checkpoints_folder(config)
    folder.make(checkpoints, lambda: find_latest(checkpoints, verify=False)[0] is not None)
    with folder.writing():
        keep_config(folder.path, config)
