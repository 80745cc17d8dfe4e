"""A new run that begins with weights from elsewhere: from another run, or from an export.

Only the weights and τ are taken. Optimizer, schedule, step and position in the data are those of a fresh run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.architecture import remedy_by_growth, stored_model
from megatron_tf.checkpoint.manager import Ranks, from_first, resolve, verify_checkpoint
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.source import CheckpointSource
from megatron_tf.config.differences import differing
from megatron_tf.config.sections.model import Model
from megatron_tf.convert.huggingface.importing import is_export, open_export
from megatron_tf.errors import CheckpointError
from megatron_tf.state.sources import FreshSource, StateSource, WeightsSource

KEY = "training.init_from"
EVENT = "weights taken"  # in the history of the run
# Keys that do not affect the weights, and that change when a model is trained on longer texts.
_FREE = ("seq_length", "rotary_base")


def find_weights(given: str, ranks: Ranks) -> Path:
    """The path of the export or verified checkpoint at `given`. CheckpointError when there is none."""
    try:
        if from_first(lambda: is_export(given), ranks):
            return Path(given)
        path = resolve(given, ranks)
        verify_checkpoint(path, ranks)
    except CheckpointError as error:
        raise CheckpointError(f"{KEY}: {error}") from error
    return path


def open_weights(path: Path, model: Model) -> tuple[StateSource, dict[str, Any]]:
    """(The state that a run of `model` begins with, the event for its history). An export is held in memory.

    CheckpointError, naming every differing key with both values, unless the weights at `path` are of such a model.
    """
    source: StateSource
    step, tokens = 0, 0
    if is_export(path):
        export = open_export(path)
        stored, source = export.model, WeightsSource(export.weights, export.scales)
    else:
        reader = open_checkpoint(path)
        stored, source = stored_model(reader.index), FreshSource(CheckpointSource(reader))
        step, tokens = reader.index.step, reader.index.tokens
    differences = [change for change in differing(stored, model) if change[0] not in _FREE]
    if differences:
        problems = "".join(f"\n  - model.{key}: there {old}, in this run {new}" for key, old, new in differences)
        free = " and ".join(f"model.{key}" for key in _FREE if key not in model.derived)
        remedies = (
            f"Give this run the same model; only {free} may differ.",
            remedy_by_growth(differences, f"remove {KEY}"),
        )
        raise CheckpointError(
            f"{KEY}: {path} holds the weights of another model:{problems}\n{' '.join(filter(None, remedies))}"
        )
    return source, {"event": EVENT, "source": str(path), "step": step, "tokens": tokens}
