"""Checkpoints of a fine-tuning run: an adapter's folder each, with what training goes on from.

checkpoints/step_00000100/ holds the adapter's two files, optimizer.safetensors (Adam's moments by parameter name) and
training.json. It exists whole or not at all. run.dir/adapter/ is the adapter after the last step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_tf.adapters.folder import Adapter, write_adapter
from megatron_tf.checkpoint.strict_json import parse_object
from megatron_tf.durable import partial_path, read_plain
from megatron_tf.errors import CheckpointError, file_errors

_MOMENTS = "optimizer.safetensors"
_PROGRESS = "training.json"
_NAME = re.compile(r"step_(\d{8})")
_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Resumed:
    """`step`: that training goes on with.  `data`: digest of the files trained on.  `moments`: by state and
    parameter."""

    step: int
    data: str
    moments: Mapping[str, Mapping[str, Tensor]]


def save(
    folder: Path, step: int, data: str, adapter: Adapter, optimizer: torch.optim.Optimizer, names: Mapping[Any, str]
) -> Path:
    """Write the checkpoint of `step`; one that is there already is left. `names`: of the parameters."""
    target = folder / f"step_{step:08d}"
    if target.exists():
        return target
    tensors = {
        f"{state}/{name}": optimizer.state[parameter][state].detach().cpu().contiguous()
        for parameter, name in names.items()
        for state in _STATES
        if parameter in optimizer.state
    }

    def complete(partial: Path) -> None:
        save_file(tensors, partial / _MOMENTS)
        progress = {"step": step, "data": data}
        (partial / _PROGRESS).write_text(json.dumps(progress) + "\n", encoding="utf-8")

    shutil.rmtree(partial_path(target), ignore_errors=True)  # what a killed run left
    write_adapter(target, adapter, complete)
    return target


def publish_adapter(target: Path, adapter: Adapter) -> None:
    """Put the adapter where an earlier one may be."""
    new = target.with_name(f"{target.name}.new")
    for left in (new, partial_path(new)):
        shutil.rmtree(left, ignore_errors=True)
    write_adapter(new, adapter)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)


def checkpoints(folder: Path) -> list[Path]:
    """Complete ones, the oldest first."""
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / _PROGRESS).is_file())


def delete_old(folder: Path, keep: int) -> None:
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def read_progress(path: Path) -> Resumed:
    """What training goes on from. CheckpointError when it is damaged."""
    with file_errors(CheckpointError, path / _PROGRESS, "Remove this checkpoint to go on from an older one."):
        fields = parse_object(str(path / _PROGRESS), read_plain(path / _PROGRESS, 2**16))
        fields.only("step", "data")
        try:
            tensors = load_file(path / _MOMENTS)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path / _MOMENTS}: is damaged ({error}). Remove this checkpoint to go on from an older one"
            ) from error
    moments: dict[str, dict[str, Tensor]] = {state: {} for state in _STATES}
    for name, tensor in tensors.items():
        state, _, parameter = name.partition("/")
        moments.setdefault(state, {})[parameter] = tensor
    return Resumed(fields.integer("step"), fields.text("data"), moments)
