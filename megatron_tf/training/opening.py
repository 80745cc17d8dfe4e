"""The opening of a run: its folder is locked, its start chosen, its plan made, its log begun."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_tf.checkpoint.manager import Ranks, find_latest
from megatron_tf.config.schema import RunConfig
from megatron_tf.durable import write_atomically
from megatron_tf.errors import ConfigError, system_reason, write_remedy
from megatron_tf.runtime.agreement import from_rank_zero, gather, together
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.run_lock import PATIENCE_SECONDS, begun_meanwhile, run_folder_lock
from megatron_tf.telemetry.console import Console
from megatron_tf.training.account import Account, account, earlier_settings, keep_config
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
    folder = Path(config.run.dir)
    exists = from_rank_zero(folder.is_dir)
    if exists:
        # Lock first: another process in this folder might write a newer checkpoint while we choose.
        together(lambda: _lock(config, closing, environment) if is_main else None)
    path, passed_over = choose(config, Ranks(environment.rank, world_size, gather))
    start = together(lambda: begin(config, path, data))
    if not all(gather(start.grown_from is not None)):
        start = replace(start, grown_from=None)
    plan = start.plan(config, world_size)
    if world_size > 1:
        check_shared(folder, is_main)
    earlier = from_rank_zero(lambda: earlier_settings(folder) if start.progress.step else None)
    told = account(config, start, world_size, earlier)
    start = replace(start, run_state={**start.run_state, "history": told.history})
    if not exists:
        together(lambda: _make_folder(config, closing, environment) if is_main else None)
    together(lambda: _prepare_folder(told.config) if is_main else None)
    console = Console(rank=environment.rank, log_path=folder / "train.log")
    closing.callback(console.close)
    return Opening(Run(told.config, plan, environment.rank, device, console), start, path, passed_over, told)


def _lock(config: RunConfig, closing: contextlib.ExitStack, environment: LaunchEnvironment) -> None:
    """Takes the run's lock until `closing` ends.

    After a SLURM requeue, ranks of the previous start can survive on an unreachable node until their watchdog fires;
    wait longer for them.
    """
    patience = PATIENCE_SECONDS
    if environment.restarts > 0:
        patience = min(config.run.hang_seconds + 60.0, config.parallel.timeout_seconds / 2)
    try:
        closing.enter_context(run_folder_lock(Path(config.run.dir), patience))
    except OSError as error:
        raise _cannot_write(config, error) from error


def _make_folder(config: RunConfig, closing: contextlib.ExitStack, environment: LaunchEnvironment) -> None:
    """Makes the folder of a new run and takes its lock. ConfigError when another run has begun there meanwhile."""
    try:
        checkpoints_folder(config).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(config, error) from error
    _lock(config, closing, environment)
    if find_latest(checkpoints_folder(config), verify=False)[0] is not None:
        raise begun_meanwhile(Path(config.run.dir))


def _prepare_folder(config: RunConfig) -> None:
    """Makes the folder of checkpoints and checks that files can be written, before hours are spent."""
    try:
        checkpoints_folder(config).mkdir(parents=True, exist_ok=True)
        attempt = checkpoints_folder(config) / f".tmp-can-write-{secrets.token_hex(4)}"
        write_atomically(attempt, b"checkpoints can be written here")
        attempt.unlink()
        keep_config(Path(config.run.dir), config)
    except OSError as error:
        raise _cannot_write(config, error) from error


def _cannot_write(config: RunConfig, error: OSError) -> ConfigError:
    place = error.filename or config.run.dir
    remedy = write_remedy(error, "Choose another folder.")
    return ConfigError(f"run.dir: cannot write to {place}: {system_reason(error, place)}. {remedy}")
