"""Opening the files of official TokenFormer weights, as tensors by official name.

A file `pytorch_model.bin`, as published: a dict of tensors. Or a training checkpoint of the official repository, a
folder of DeepSpeed's, in which a run without pipeline stages has written

    mp_rank_00_model_states.pt                   weights in the compute type (fp16), order of the optimizer's groups
    zero_pp_rank_D_mp_rank_00_optim_states.pt    data rank D's part of each group's fp32 master weights, flat

and a run with stages, instead of the weights in mp_rank_00, one file `layer_NN-model_00-model_states.pt` for each
element of the sequence and a numbered mp_rank for each stage. The masters are used, because training resumes from them
and they are what is published: all parts of a group, one after another, are its tensors in order, then padding.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tf.convert.torch_file import load_torch_file
from megatron_tf.durable import read_plain
from megatron_tf.errors import CheckpointError, file_errors, shown

WEIGHTS_NAME = "pytorch_model.bin"
_LATEST = "latest"
_STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)(?:-model_(\d+))?-model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_PARTITIONS = "single_partition_of_fp32_groups"
_TRAINER_PACKAGES = ("deepspeed", "numpy")  # a trainer's own state names their classes; none of it is needed
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TIED_EMBEDDING = "tied_modules.embed."
_LONGEST_TAG = 1_000


@dataclass(frozen=True)
class OfficialWeights:
    """Weights by official name, on the CPU, mostly memory-mapped.

    `files`: that they were read from.  `description`: of these files, as text.  `arguments`: of the model, as recorded
    by the official trainer; empty for a published file.
    """

    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    description: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def open_official(path: Path | str) -> OfficialWeights:
    """The weights in a published file, in a folder with one, or in a DeepSpeed checkpoint or the folder around some.

    No code in a file is run. CheckpointError when it is not of these kinds, or incomplete, or damaged.
    """
    source = Path(path)
    with file_errors(CheckpointError, source, "Give the published file, or a training checkpoint's folder."):
        source.stat()
        source = _inside(source) if source.is_dir() else source
        weights = _training_checkpoint(source) if source.is_dir() else _published(source)
    return weights


def _inside(folder: Path) -> Path:
    """The path of the weights in `folder`: its published file, its newest training checkpoint, or itself."""
    found = [file for file in (folder / WEIGHTS_NAME,) if os.path.lexists(file)]
    latest = folder / _LATEST
    if os.path.lexists(latest):
        with file_errors(CheckpointError, latest, "Give the checkpoint."):
            tag = read_plain(latest, _LONGEST_TAG).decode("utf-8", errors="replace").strip()
        found.append(folder / Path(tag).name)
        if not tag or not found[-1].is_dir():
            raise CheckpointError(
                f"{latest}: names {shown(tag)}, and there is no such folder next to it. Give the checkpoint"
            )
    if any(_STATES.fullmatch(file.name) for file in folder.iterdir()):
        found.append(folder)
    if len(found) > 1:
        raise CheckpointError(f"{folder}: holds {' and '.join(map(str, found))}. Give the one that is meant")
    if not found:
        raise CheckpointError(
            f"{folder}: holds neither {WEIGHTS_NAME} nor {_LATEST} nor mp_rank_00_model_states.pt. Give the published "
            "file, or a training checkpoint's folder"
        )
    return found[0]


def _published(file: Path) -> OfficialWeights:
    if any(kind.fullmatch(file.name) for kind in (_STATES, _LAYER, _OPTIMIZER)):
        raise CheckpointError(f"{file}: is one file of a training checkpoint: give its folder, {file.parent}")
    return OfficialWeights(_state_dict(file, load_torch_file(file)), (file,), "published weights")


def _state_dict(file: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{file}: holds {_kind(content)}, expected a dict of weights by name")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: holds {_kind(value)} as {shown(name)}, expected tensors by name alone")
        _check_tensor(file, name, value)
    return {name: value.detach() for name, value in content.items()}


def _check_tensor(file: Path, name: str, tensor: Tensor) -> None:
    """Refuses unusual layouts: with strides of 0 a pickle can describe a tensor of any size over a few bytes."""
    if tensor.dtype not in _DTYPES:
        raise CheckpointError(f"{file}: {name} is of type {tensor.dtype}, expected float32, float16 or bfloat16")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{file}: {name} of shape {shown(list(tensor.shape))} is not stored as plain numbers")


def _training_checkpoint(folder: Path) -> OfficialWeights:
    numbered = _numbered_files(folder)
    states = {rank: _object(file) for rank, file in numbered.states.items()}
    recorded = states[0].get("args")
    arguments = recorded if isinstance(recorded, dict) else {}
    if states[0].get("module") is not None:
        if len(states) > 1:
            raise _sharded(folder, f"{len(states)} mp_rank files with weights")
        weights = _state_dict(numbered.states[0], states[0]["module"])
    else:
        weights = {}
        for position, file in numbered.layers.items():
            layer = _state_dict(file, load_torch_file(file, unread=_TRAINER_PACKAGES))
            weights |= {f"sequential.{position}.{name}": tensor for name, tensor in layer.items()}
    files = (*numbered.states.values(), *numbered.layers.values())
    what = f"training checkpoint {folder.name}"
    if not numbered.optimizer:
        dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}))
        return OfficialWeights(weights, files, f"{what}, {dtypes} weights without their fp32 masters", arguments)
    masters: dict[str, Tensor] = {}
    for rank, state in states.items():
        parts = numbered.optimizer.get(rank, {})
        _check_all_there(folder, rank, parts, state)
        for name, tensor in _masters(folder, state, list(parts.values())):
            masters.setdefault(name, tensor)  # the head's copy of the embedding is on the last stage again
    _check_masters(folder, masters, weights)
    files += tuple(file for parts in numbered.optimizer.values() for file in parts.values())
    ranks = len(numbered.optimizer[0])
    return OfficialWeights({**weights, **masters}, files, f"{what}, fp32 masters of {ranks} data ranks", arguments)


@dataclass(frozen=True)
class _Files:
    """Of one training checkpoint, each in ascending order. `optimizer`: by mp_rank and data rank."""

    states: dict[int, Path]
    layers: dict[int, Path]
    optimizer: dict[int, dict[int, Path]]


def _numbered_files(folder: Path) -> _Files:
    states: dict[int, Path] = {}
    layers: dict[int, Path] = {}
    optimizer: dict[int, dict[int, Path]] = {}
    for file in sorted(folder.iterdir()):
        if match := _STATES.fullmatch(file.name):
            states[int(match[1])] = file
        elif match := _LAYER.fullmatch(file.name):
            if int(match[2] or 0) > 0:
                raise _sharded(folder, file.name)
            layers[int(match[1])] = file
        elif match := _OPTIMIZER.fullmatch(file.name):
            optimizer.setdefault(int(match[2]), {})[int(match[1])] = file
    if sorted(states) != list(range(len(states))) or not states:
        present = ", ".join(file.name for file in states.values()) or "none of its mp_rank files"
        raise CheckpointError(f"{folder}: holds {present}: a file of the checkpoint is missing. Copy all of the folder")
    return _Files(states, layers, {mp: dict(sorted(parts.items())) for mp, parts in optimizer.items()})


def _check_all_there(folder: Path, rank: int, parts: Mapping[int, Path], state: Mapping[str, Any]) -> None:
    """CheckpointError unless all parts of the groups are there."""
    recorded = state.get("dp_world_size")
    count = recorded if isinstance(recorded, int) else len(parts)
    if len(parts) != count or list(parts) != list(range(len(parts))):
        raise CheckpointError(
            f"{folder}: holds {len(parts)} of the {shown(count)} files "
            f"zero_pp_rank_*_mp_rank_{rank:02d}_optim_states.pt. Copy all of the folder"
        )


def _masters(folder: Path, state: Mapping[str, Any], files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """(official name, fp32 tensor) of one mp_rank: views of the files' memory, copies where two parts meet."""
    parts = [_partitions(file, _object(file)) for file in files]
    groups = _shapes(state)
    if not groups or any(len(part) != len(groups) for part in parts):
        raise CheckpointError(
            f"{folder}: holds no {_PARTITIONS} for the groups in param_shapes, as ZeRO stage 1 writes them. Make "
            f"{WEIGHTS_NAME} of it with the script zero_to_fp32.py that DeepSpeed has put next to it, and give that"
        )
    for number, shapes in enumerate(groups):
        partitions = [part[number].reshape(-1) for part in parts]
        total, offset = sum(len(partition) for partition in partitions), 0
        for name, shape in shapes.items():
            end = offset + math.prod(shape)  # which torch would count modulo 2**64
            if end > total:
                raise CheckpointError(f"{folder}: the master weights of {name} end after {total:,} elements of a group")
            yield _official_name(name), _slice(partitions, offset, end).view(shape)
            offset = end


def _shapes(state: Mapping[str, Any]) -> list[dict[str, torch.Size]]:
    """The tensors of each optimizer group by name, in the order of its masters; nothing when that is not recorded."""
    groups = state.get("param_shapes")
    usable = isinstance(groups, list) and all(
        isinstance(group, dict)
        and all(
            isinstance(name, str) and isinstance(shape, torch.Size) and all(n > 0 for n in shape)
            for name, shape in group.items()
        )
        for group in groups
    )
    return groups if usable and groups is not None else []


def _partitions(file: Path, content: Mapping[str, Any]) -> list[Tensor]:
    """One data rank's part of the masters of each group; empty unless it is a state of ZeRO stage 1 or 2."""
    state = content.get("optimizer_state_dict")
    partitions = state.get(_PARTITIONS) if isinstance(state, dict) else None
    if not isinstance(partitions, list) or not all(isinstance(partition, Tensor) for partition in partitions):
        return []
    for number, partition in enumerate(partitions):
        _check_tensor(file, f"{_PARTITIONS}[{number}]", partition)
    return partitions


def _slice(partitions: list[Tensor], start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the partitions, one after the other."""
    found, first = [], 0
    for partition in partitions:
        piece = partition[max(start - first, 0) : max(stop - first, 0)]
        if len(piece):
            found.append(piece)
        first += len(partition)
    return found[0] if len(found) == 1 else torch.cat([piece.float() for piece in found])


def _official_name(name: str) -> str:
    """The official name of a tensor in a pipeline's file, where modules are named by position, and the embedding by its
    tie to the head."""
    if name.startswith(_TIED_EMBEDDING):
        return f"sequential.0.{name.removeprefix(_TIED_EMBEDDING)}"
    return f"sequential.{name}" if name[:1].isdigit() else name


def _check_masters(folder: Path, masters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """CheckpointError unless every weight is its master, rounded, which proves that parts were joined in order."""
    for name, weight in weights.items():
        master = masters.get(name)
        if master is None or master.shape != weight.shape or not torch.equal(master.to(weight.dtype), weight):
            raise CheckpointError(
                f"{folder}: the fp32 master of {name} {'is missing' if master is None else 'does not round to it'}, so "
                "the files are not of one save. Copy all of the folder anew, or move its *_optim_states.pt away to "
                "take the weights without their masters"
            )


def _object(file: Path) -> dict[str, Any]:
    content = load_torch_file(file, unread=_TRAINER_PACKAGES)
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: holds {_kind(content)}, expected a training state by name")
    return content


def _sharded(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {what} is of a run with model_parallel_size above 1, and such are not read: the official layer "
        "cannot be trained in that way"
    )


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
