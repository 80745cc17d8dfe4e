"""Training from Python: a script or notebook that wants the run's metrics and its model, without a launcher."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tf.config.load import build_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.stages import load_stages
from megatron_tf.errors import ConfigError, LaunchError
from megatron_tf.runtime.environment import LaunchEnvironment, detect
from megatron_tf.runtime.stop_signals import SIGNALS, StopSignals
from megatron_tf.shipped import find_configuration

if TYPE_CHECKING:
    from megatron_tf.model.tokenformer import TokenFormer


@dataclass(frozen=True)
class Trained:
    """A finished run; of a chain of stages, its last one.

    `metrics`: the objects of metrics.jsonl in their order, with keys such as "step", "train/loss" and "eval/loss".
    `model`: on the CPU in fp32, with the weights of `checkpoint`, the run's last.
    """

    config: RunConfig
    metrics: list[dict[str, Any]]
    model: TokenFormer
    checkpoint: Path


def train(config: str | os.PathLike[str] | RunConfig, overrides: Sequence[str] = ()) -> Trained:
    """Trains as a configuration says, on this process alone, and returns metrics and model.

    `config`: the path of a YAML file, the name of a shipped configuration, or a `RunConfig`. `overrides`:
    "section.field=value", as on a command line. The run is the one of `python launch/train.py`: it writes into run.dir,
    resumes from a checkpoint there, grows when the configuration says so, and trains all stages of a chain.

    Errors: UserError for what the user can correct, such as LaunchError when a launcher started this process as one of
    several. RunStopped, after a save, if Ctrl-C or a signal asked it to stop.
    """
    stages = _stages(config, overrides)
    environment = detect(os.environ)
    if environment.world_size > 1:
        raise LaunchError(
            f"megatron_tf.train runs on one process, and this is one of {environment.world_size}. Start several with "
            "`torchrun -m megatron_tf train CONFIG`."
        )
    with _signals_restored():
        _run(stages, environment)
    return _trained(stages[-1])


def _stages(config: str | os.PathLike[str] | RunConfig, overrides: Sequence[str]) -> list[RunConfig]:
    if isinstance(overrides, str):
        raise ConfigError(f"overrides: {overrides!r} is text. Give a list: [{overrides!r}].")
    if isinstance(config, RunConfig):
        return [build_config(config.model_dump(by_alias=True), [], overrides)]
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError(
            f"config: {config!r} is a {type(config).__name__}. Give the path of a YAML file, the name of a shipped "
            "configuration, or a RunConfig."
        )
    return load_stages(find_configuration(os.fspath(config)), overrides)


def _run(stages: Sequence[RunConfig], environment: LaunchEnvironment) -> None:
    # Before torch is imported, because a signal would kill the process until then.
    stop = StopSignals()
    from megatron_tf.telemetry.console import quiet_libraries
    from megatron_tf.training.preflight import preflight
    from megatron_tf.training.run import train as train_stages

    quiet_libraries()
    preflight(stages, environment)
    train_stages(stages, environment, stop)


def _trained(config: RunConfig) -> Trained:
    from megatron_tf.checkpoint.manager import resolve
    from megatron_tf.inference.load import load_model
    from megatron_tf.telemetry.records import read_records

    run = Path(config.run.dir)
    checkpoint = resolve(run)
    return Trained(config, list(read_records(run)), load_model(checkpoint), checkpoint)


@contextmanager
def _signals_restored() -> Iterator[None]:
    """Restores the signal handlers of the calling program at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
