"""Where a run begins: at its own newest checkpoint, at a smaller model's, or at initial weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.architecture import check_growable, check_same_architecture, stored_model
from megatron_tf.checkpoint.manager import CHECKPOINTS_FOLDER, find_latest, resolve
from megatron_tf.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_tf.checkpoint.source import CheckpointSource, InitialSource, StateSource, grown_source
from megatron_tf.config.schema import RunConfig
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.growth.source import growth_entry


@dataclass(frozen=True)
class Progress:
    """How far a run is. `samples` is the position in the data; `tokens` counts since the very first stage."""

    step: int = 0
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Start:
    """Everything a run starts from. `grown_from` is the open source checkpoint when this start is a growth."""

    source: StateSource
    description: str
    progress: Progress = Progress()
    growth_history: tuple[Mapping[str, Any], ...] = ()
    grown_from: CheckpointReader | None = None
    trackers: Mapping[str, str] = field(default_factory=dict)
    run_state: Mapping[str, Any] = field(default_factory=dict)


def checkpoints_folder(config: RunConfig) -> Path:
    return Path(config.run.dir) / CHECKPOINTS_FOLDER


def choose(config: RunConfig) -> tuple[Path | None, list[str]]:
    """The checkpoint to start from (None: initial weights) and what was passed over on the way, with reasons.

    All its checksums are compared. Meant for one rank; the others take its word. CheckpointError when the
    growth source holds no complete checkpoint; ConfigError when the run must not resume and has checkpoints of its own.
    """
    own = checkpoints_folder(config)
    latest, passed = find_latest(own, verify=config.checkpoint.resume == "auto")
    if latest is not None and config.checkpoint.resume == "never":
        # a later resume would take the highest step, whichever of the two runs it is of
        raise ConfigError(
            f"checkpoint.resume: is never, but {own} holds {latest.name} of an earlier run. Choose another run.dir, "
            "or delete that folder."
        )
    skipped = [f"{path}: not used: {reason}" for path, reason in passed]
    if latest is None and config.growth is not None:
        latest = resolve(config.growth.source)
        open_checkpoint(latest).verify()
    return latest, skipped


def begin(config: RunConfig, path: Path | None, data: Mapping[str, Any]) -> Start:
    """The start from `path` as `choose` found it.

    `data`: the fingerprint of the training data. CheckpointError when the checkpoint is of another architecture
    or was trained on other data; ConfigError when the model cannot be grown from it.
    """
    if path is None:
        return Start(InitialSource(config.model, config.run.seed), f"initial weights of seed {config.run.seed}")
    reader = open_checkpoint(path)
    index = reader.index
    if path.resolve().parent == checkpoints_folder(config).resolve():
        check_same_architecture(index, config.model)
        _check_data(config, index.data, data, path)
        return Start(
            CheckpointSource(reader), f"resumed from {path} at step {index.step:,}",
            Progress(index.step, index.samples, index.tokens), index.growth_history,
            trackers=index.trackers, run_state=index.run,
        )  # fmt: skip
    growth = config.growth
    assert growth is not None
    check_growable(index, config.model)
    entry = growth_entry(
        method=growth.method, moments=growth.moments, source=str(path), step=index.step, samples=index.samples,
        tokens=index.tokens, old_model=stored_model(index), new_model=config.model,
    )  # fmt: skip
    # the same data goes on where the smaller model stopped; other data begins at its beginning
    samples = index.samples if dict(index.data) == dict(data) else 0
    return Start(
        grown_source(reader, config.model, growth, config.run.seed), f"grown from {path} by {growth.method}",
        Progress(0, samples, index.tokens), (*index.growth_history, entry), grown_from=reader,
    )  # fmt: skip


def _check_data(config: RunConfig, stored: Mapping[str, Any], data: Mapping[str, Any], path: Path) -> None:
    if stored and dict(stored) != dict(data) and not config.checkpoint.allow_data_change:
        differing = [key for key in {*stored, *data} if stored.get(key) != data.get(key)]
        raise CheckpointError(
            f"{path}: was trained on other data: {', '.join(sorted(differing))} differ (checkpoint "
            f"{[stored.get(key) for key in sorted(differing)]}, now {[data.get(key) for key in sorted(differing)]}). "
            "The sample order would not continue. Restore the data, or set checkpoint.allow_data_change=true."
        )
