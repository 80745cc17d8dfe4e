"""The way back: an exported folder, also one that was trained further with transformers, as step 0 of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tf.config.schema import Model
from megatron_tf.convert.huggingface.configuration import stored_model
from megatron_tf.convert.huggingface.export import CONFIG_NAME, WEIGHTS_NAME
from megatron_tf.errors import CheckpointError, file_errors
from megatron_tf.params import EMBEDDING, parameter_table

INDEX_NAME = WEIGHTS_NAME + ".index.json"  # beside the parts of weights that transformers has split
_HEAD = "lm_head.weight"
_LISTED = 6  # problems that a message spells out
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class HuggingFaceModel:
    """`weights`, in memory and of the type they were stored in, and τ in `scales`, both by logical name."""

    model: Model
    scales: Mapping[str, float]
    weights: Mapping[str, Tensor]


def is_export(path: Path | str) -> bool:
    """Is there a configuration of transformers in the folder? Our own checkpoints have none."""
    return (Path(path) / CONFIG_NAME).is_file()


def open_export(path: Path | str) -> HuggingFaceModel:
    """Read an exported folder. Nothing in it is run, and transformers is not needed.

    CheckpointError when it is no TokenFormer, or when tensors are missing, unknown, of another shape, or not finite.
    """
    folder = Path(path)
    config = _read_json(folder / CONFIG_NAME)
    try:
        model, scales = stored_model(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from error
    stored = _read_tensors(folder)
    table = parameter_table(model)
    embedding = table[EMBEDDING].huggingface_name
    head = stored.pop(_HEAD, None)
    if head is not None and embedding in stored and not torch.equal(head, stored[embedding]):
        raise CheckpointError(f"{folder}: {_HEAD} is not {embedding}, and here the output head is the embedding")
    expected = {spec.huggingface_name: spec.shape[::-1] if spec.transposed else spec.shape for spec in table.values()}
    _check(folder, {name: tuple(tensor.shape) for name, tensor in stored.items()}, expected)
    weights = {}
    for name, spec in table.items():
        tensor = stored.pop(spec.huggingface_name)  # one copy at a time
        if tensor.dtype not in _DTYPES or not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: {spec.huggingface_name} is of type {tensor.dtype}, or not finite")
        weights[name] = (tensor.mT if spec.transposed else tensor).contiguous()
    return HuggingFaceModel(model, scales, weights)


def _check(folder: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"missing tensor {name}" for name in expected if name not in found]
    problems += [f"unknown tensor {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, {CONFIG_NAME} says {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f"\n  - and {len(problems) - _LISTED:,} more" if len(problems) > _LISTED else ""
        raise CheckpointError(
            f"{folder}: the weights are not those of its {CONFIG_NAME}:\n  - " + "\n  - ".join(problems[:_LISTED]) + more
            + "\nGive the whole folder as it was exported or saved; an adapter has to be merged first."
        )  # fmt: skip


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX_NAME
    tensors: dict[str, Tensor] = {}
    names = [WEIGHTS_NAME]
    if index.exists() and not (folder / WEIGHTS_NAME).exists():
        places = _read_json(index)
        places = places.get("weight_map") if isinstance(places, dict) else None
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise CheckpointError(f"{index}: has no weight_map of tensors to files")
        names = sorted({Path(name).name for name in places.values()})
    for name in names:
        path = folder / name
        with file_errors(CheckpointError, path, "Give the whole folder."):
            try:
                with open(path, "rb"), safe_open(path, "pt") as file:
                    tensors |= {key: file.get_tensor(key) for key in file.keys()}
            except SafetensorError as error:
                raise CheckpointError(f"{path}: is no safetensors file, or a damaged one ({error})") from error
    return tensors


def _read_json(path: Path) -> Any:
    with file_errors(CheckpointError, path, "Give a folder that was exported by to-hf."):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
