"""Checkpoints of a fine-tuning run: adapter folders with the state that training resumes from.

run.dir/checkpoints/step_00000100/ holds the adapter's two files, optimizer.safetensors (Adam's moments by parameter
name) and training.json. It exists whole or not at all. run.dir/adapter/ is the adapter after the last step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_tf.adapters.folder import Adapter, write_adapter
from megatron_tf.checkpoint.safetensors_file import open_safetensors
from megatron_tf.checkpoint.strict_json import parse_object
from megatron_tf.durable import partial_path, read_plain
from megatron_tf.errors import CheckpointError, file_errors
from megatron_tf.finetuning.sharding import whole

_MOMENTS = "optimizer.safetensors"
_REMOVE = "Remove this checkpoint to go on from an older one"
_PROGRESS = "training.json"
_NAME = re.compile(r"step_(\d{8})")
_STATES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """The content of training.json.

    `step`: updates done.  `data`: digest of the training files.  `tokens`: learnt so far.  `trackers`: see
    `Trackers.ids`.  `rows`: read so far, over all epochs; None in a checkpoint of an earlier version.
    """

    step: int
    data: str
    tokens: int = 0
    trackers: Mapping[str, str] = field(default_factory=dict)
    rows: int | None = None


@dataclass(frozen=True)
class Resumed:
    """The state to resume from.  `moments`: of Adam, by state and parameter name."""

    progress: Progress
    moments: Mapping[str, Mapping[str, Tensor]]


def whole_moments(optimizer: torch.optim.Optimizer, names: Mapping[Any, str]) -> dict[str, Tensor]:
    """Adam's moments by "state/parameter name", whole and on the CPU. All ranks call it together."""
    return {
        f"{state}/{name}": whole(optimizer.state[parameter][state]).detach().cpu().contiguous()
        for parameter, name in names.items()
        for state in _STATES
        if parameter in optimizer.state
    }


def save(folder: Path, progress: Progress, adapter: Adapter, moments: Mapping[str, Tensor]) -> Path:
    """Write a checkpoint, unless there is one of this step, and return its path. `moments`: from `whole_moments`."""
    target = folder / f"step_{progress.step:08d}"
    if target.exists():
        return target

    def complete(partial: Path) -> None:
        save_file(dict(moments), partial / _MOMENTS)
        fields = {name: value for name, value in asdict(progress).items() if value is not None}
        (partial / _PROGRESS).write_text(json.dumps(fields) + "\n", encoding="utf-8")

    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial_path(target), ignore_errors=True)  # what a killed run left
    write_adapter(target, adapter, complete)
    return target


def publish_adapter(target: Path, adapter: Adapter) -> None:
    """Write the adapter to `target`, in place of an earlier one."""
    new = target.with_name(f"{target.name}.new")
    for left in (new, partial_path(new)):
        shutil.rmtree(left, ignore_errors=True)
    write_adapter(new, adapter)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the oldest first."""
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / _PROGRESS).is_file())


def delete_old(folder: Path, keep: int) -> None:
    for path in checkpoints(folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def read_progress(path: Path) -> Resumed:
    """The state in the checkpoint `path`. CheckpointError when it is damaged."""
    with file_errors(CheckpointError, path / _PROGRESS, f"{_REMOVE}."):
        fields = parse_object(str(path / _PROGRESS), read_plain(path / _PROGRESS, 2**16))
        fields.only(*Progress.__dataclass_fields__)
    with open_safetensors(path / _MOMENTS, _REMOVE) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    moments: dict[str, dict[str, Tensor]] = {state: {} for state in _STATES}
    for name, tensor in tensors.items():
        state, _, parameter = name.partition("/")
        moments.setdefault(state, {})[parameter] = tensor
    more: dict[str, Any] = {}
    if "tokens" in fields:  # checkpoints of earlier versions have neither `tokens` nor `trackers`
        more = {"tokens": fields.integer("tokens"), "trackers": fields.plain("trackers")}
    if "rows" in fields:
        more["rows"] = fields.integer("rows")
    return Resumed(Progress(fields.integer("step"), fields.text("data"), **more), moments)
