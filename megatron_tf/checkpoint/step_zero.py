"""Writing a checkpoint at step 0 without holding it in memory: each range is computed while it is written.

So a grown, pruned or imported model becomes step 0 of an ordinary run. A grown one equals the one that the trainer
would begin with, because both use the same functions.
"""

from __future__ import annotations

import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_tf.checkpoint.format import BYTES_PER_ELEMENT, CheckpointIndex, expected_tensors, folder_name
from megatron_tf.checkpoint.kinds import CHECKPOINTS_FOLDER
from megatron_tf.checkpoint.manager import (
    FAILED_PREFIX,
    STEP_PREFIX,
    UNFINISHED_PREFIX,
    clear_leftovers,
)
from megatron_tf.checkpoint.shards import ComputedTensor
from megatron_tf.checkpoint.writer import ComputedPiece, save_checkpoint
from megatron_tf.config.sections.model import Model
from megatron_tf.durable import check_writable
from megatron_tf.errors import CheckpointError, broken_link, write_remedy
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.state.parameters import parameter_table
from megatron_tf.state.sources import StepZero, WeightsSource

FIRST_STEP = 0


def checkpoint_bytes(model: Model, states: Sequence[str] = STATES) -> int:
    """Bytes of a model's `states` in a checkpoint: weights, and those of an optimizer."""
    return sum(spec.numel for spec in parameter_table(model).values()) * len(states) * BYTES_PER_ELEMENT


def target_folder(path: Path | str) -> Path:
    """The folder that `path` means and that will hold the checkpoint: a run's folder means its checkpoints folder.

    CheckpointError when it holds anything already, because it would not be clear which one a run resumes from, and
    when it cannot be written, before work is spent on the checkpoint.
    """
    root = Path(path)
    if root.name.startswith(STEP_PREFIX):
        raise CheckpointError(
            f"{root}: is the name of one checkpoint. Give the run's folder; the checkpoint will be "
            f"{CHECKPOINTS_FOLDER}/{folder_name(FIRST_STEP)} within it."
        )
    if root.name != CHECKPOINTS_FOLDER:
        root = root / CHECKPOINTS_FOLDER
    if problem := broken_link(root):
        raise CheckpointError(f"{root}: {problem}. Give another folder.")
    check_writable(CheckpointError, root, "Give another folder.")
    leftovers = (UNFINISHED_PREFIX, FAILED_PREFIX)  # of an attempt that was killed; the next one clears them away
    held = sorted(p.name for p in root.iterdir() if not p.name.startswith(leftovers)) if root.is_dir() else []
    if held:
        raise CheckpointError(f"{root}: holds {held[-1]} already. Nothing is overwritten: give another folder.")
    return root


def write_step_zero(
    root: Path, model: Model, start: StepZero, data: Mapping[str, Any], progress: Callable[[int, str], None]
) -> Path:
    """Write step 0 of a run of `model` under `root`; returns the checkpoint. Holds one bounded buffer of the state.

    `data`: fingerprint of the data that the model will be trained on.
    `progress`: called with the bytes done so far and the tensor that is being written.
    Errors: CheckpointError, with nothing left behind.
    """
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        clear_leftovers(root, report=_warn)
        _check_space(root, checkpoint_bytes(model, start.states))
        index, pieces = _contents(model, start, data, progress)
        return save_checkpoint(root, pieces, index, rank=0, world_size=1, token=secrets.token_hex(4))
    except CheckpointError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        remedy = write_remedy(error.__cause__, "Give another folder.")
        raise CheckpointError(f"{error}. {remedy}") from error.__cause__
    except KeyboardInterrupt:  # else many gigabytes would stay under a hidden name
        clear_leftovers(root, report=_warn)
        for folder in made:
            with suppress(OSError):  # not empty, or never made
                folder.rmdir()
        raise


def _contents(
    model: Model, start: StepZero, data: Mapping[str, Any], progress: Callable[[int, str], None]
) -> tuple[CheckpointIndex, list[ComputedPiece]]:
    """The index of a checkpoint at step 0, and all of its state, computed when it is written."""
    table = parameter_table(model)
    index = CheckpointIndex(
        step=FIRST_STEP,
        samples=start.samples,
        tokens=start.tokens,
        model=model.model_dump(mode="json"),
        scales=dict(start.source.scales),
        tensors=expected_tensors({name: spec.shape for name, spec in table.items()}, start.states),
        adam_steps={name: tuple(start.source.adam_steps(name, 0, spec.numel)) for name, spec in table.items()},
        growth_history=start.growth_history,
        data=data,
    )
    done = 0

    def computed(name: str, state: str) -> ComputedTensor:
        def fill(first: int, target: Tensor) -> None:
            nonlocal done
            start.source.read_into(name, state, first, target)
            done += target.numel() * BYTES_PER_ELEMENT
            progress(done, name)

        return ComputedTensor(table[name].numel, fill)

    pieces = [
        ComputedPiece(name, state, 0, spec.numel, computed(name, state))
        for name, spec in table.items()
        for state in start.states
    ]
    return index, pieces


def write_weights(
    root: Path,
    model: Model,
    weights: Mapping[str, Tensor],
    scales: Mapping[str, float],
    progress: Callable[[int, str], None],
) -> Path:
    """Write weights that were trained elsewhere as step 0 of a run of `model` under `root`; returns the checkpoint.

    `weights`, of any float type, and τ in `scales` are by logical name; the states are AdamW's, as of a fresh model.
    See `write_step_zero` for the rest.
    """
    start = StepZero(WeightsSource(weights, scales), samples=0, tokens=0, growth_history=())
    return write_step_zero(root, model, start, {}, progress)


def _warn(problem: str) -> None:
    print(f"warning: {problem}", file=sys.stderr)


def _check_space(root: Path, needed: int) -> None:
    existing = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CheckpointError(
            f"{root}: the checkpoint takes {needed:,} bytes, and {free:,} are free there. Make room, or give "
            "another folder."
        )
