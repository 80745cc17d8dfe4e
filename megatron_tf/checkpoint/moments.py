"""The checkpoint of a run that a growth or a branch begins with: its newest one, or the one that its decay began
with."""

from __future__ import annotations

from pathlib import Path

from megatron_tf.checkpoint.manager import (
    ALONE,
    BEFORE_DECAY,
    Ranks,
    complete_checkpoints,
    from_first,
    resolve,
)
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.config.sections.growth import Moment
from megatron_tf.errors import CheckpointError


def resolve_at(path: Path | str, at: Moment, ranks: Ranks = ALONE) -> Path:
    """The checkpoint that a user means by `path` and `at`, see `resolve`; CheckpointError when there is none."""
    if at == "end":
        return resolve(path, ranks)
    return from_first(lambda: _before_decay(Path(path)), ranks)


def _before_decay(path: Path) -> Path:
    newest = open_checkpoint(resolve(path))
    found = [newest]
    if newest.path.resolve() != path.resolve():
        found = complete_checkpoints(newest.path.parent)
    for reader in found:
        if reader.index.run.get(BEFORE_DECAY):
            return reader.path
    others = complete_checkpoints(newest.path.parent) if len(found) == 1 else []
    for reader in others:
        if reader.index.run.get(BEFORE_DECAY):
            raise CheckpointError(
                f"{path}: is the checkpoint of step {newest.index.step:,}, with which no decay began. One began with "
                f"that of step {reader.index.step:,}: give {newest.path.parent}, or begin here (at: end)"
            )
    steps = ", ".join(f"{reader.index.step:,}" for reader in found)
    raise CheckpointError(
        f"{path}: holds the checkpoints of step {steps}, and a decay began with none of them. Train it with a wsd "
        "schedule and checkpoint.keep_before_decay: true, or begin at the end (at: end)"
    )
