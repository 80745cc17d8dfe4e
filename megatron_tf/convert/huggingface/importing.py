"""The way back: an exported folder, also one that was trained further with transformers, as step 0 of a run."""

from __future__ import annotations

import json
import os
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
_ADAPTER_NAME = "adapter_config.json"  # of PEFT, which saves an adapter without its model
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
    """Is there a configuration of transformers in the folder, whole or not? Our own checkpoints have none."""
    return any(os.path.lexists(Path(path) / name) for name in (CONFIG_NAME, _ADAPTER_NAME))


def open_export(path: Path | str) -> HuggingFaceModel:
    """Read an exported folder. Nothing in it is run, and transformers is not needed.

    CheckpointError when it is no TokenFormer, or when tensors are missing, unknown, of another shape, or not finite.
    """
    folder = Path(path)
    if os.path.isfile(folder):
        raise CheckpointError(f"{folder}: is a file. Give the folder that it lies in, {folder.parent}")
    if os.path.lexists(folder / _ADAPTER_NAME) and not os.path.lexists(folder / CONFIG_NAME):
        raise CheckpointError(
            f"{folder}: holds an adapter without its model. Merge it first, with PEFT's merge_and_unload() and then "
            "save_pretrained(), and give the folder that this writes"
        )
    config = _read_json(folder / CONFIG_NAME)
    try:
        model, scales = stored_model(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from error
    stored = _read_tensors(folder)
    table = parameter_table(model)
    embedding = table[EMBEDDING].huggingface_name
    head = stored.pop(_HEAD, None)
    if head is not None and embedding in stored and not _same(head, stored[embedding]):
        raise CheckpointError(
            f"{folder}: {_HEAD} is not {embedding}, and here the output head is the embedding. Give a model that was "
            "trained with the two tied"
        )
    expected = {spec.huggingface_name: spec.shape[::-1] if spec.transposed else spec.shape for spec in table.values()}
    _check(folder, {name: tuple(tensor.shape) for name, tensor in stored.items()}, expected)
    weights = {}
    for name, spec in table.items():
        tensor = stored.pop(spec.huggingface_name)  # one copy at a time
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{folder}: {spec.huggingface_name} is of type {_type_name(tensor.dtype)}, expected "
                f"{' or '.join(map(_type_name, _DTYPES))}. Save the model in one of them, neither quantised nor cast"
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{folder}: {spec.huggingface_name} holds values that are infinite or no numbers: the training diverged, "
                "or the file is damaged. Give an earlier model, or copy the file again"
            )
        weights[name] = (tensor.mT if spec.transposed else tensor).contiguous()
    return HuggingFaceModel(model, scales, weights)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    with file_errors(CheckpointError, path, "Give a folder that to-hf or save_pretrained of transformers wrote."):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}). Copy it again") from error
