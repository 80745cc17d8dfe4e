"""Reads an exported folder, also one that was trained further with transformers, so that a run can begin with it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.kinds import holds_run
from megatron_tf.checkpoint.safetensors_file import open_safetensors
from megatron_tf.checkpoint.strict_json import NotJsonError, parse_json
from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import task_of
from megatron_tf.convert.huggingface.configuration import model_from_config
from megatron_tf.convert.huggingface.export import CONFIG_NAME, WEIGHTS_NAME
from megatron_tf.convert.tensors import differing_tensors
from megatron_tf.durable import read_plain
from megatron_tf.errors import CheckpointError, file_errors, shown
from megatron_tf.state.parameters import parameter_table
from megatron_tf.tasks.language_model.task import EMBEDDING
from megatron_tf.telemetry.text import bullets

INDEX_NAME = WEIGHTS_NAME + ".index.json"  # lists the files when transformers has split the weights
_ADAPTER_NAME = "adapter_config.json"  # of PEFT, which saves an adapter without its model
_HEAD = "lm_head.weight"
_LISTED = 6  # most problems that a message lists
_LARGEST_JSON = 2**26
_WEIGHTS_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class HuggingFaceModel:
    """A model read from an export. `scales`: τ by projection.  `weights`: in memory, in the type in which they were
    stored. Both are keyed by our logical names."""

    model: Model
    scales: Mapping[str, float]
    weights: Mapping[str, Tensor]


def is_export(path: Path | str) -> bool:
    """Whether the folder has a configuration of transformers or PEFT, valid or not. Our own checkpoints have none."""
    return any(os.path.lexists(Path(path) / name) for name in (CONFIG_NAME, _ADAPTER_NAME))


def stored_classes(path: Path | str) -> tuple[str, ...]:
    """The names of the classes in the configuration of an exported folder, in the order of the logits; () without any.

    CheckpointError when the configuration cannot be read.
    """
    config = _read_json(Path(path) / CONFIG_NAME)
    names = config.get("id2label") if isinstance(config, dict) else None
    if not isinstance(names, dict) or set(names) != {str(number) for number in range(len(names))}:
        return ()
    return tuple(str(names[str(number)]) for number in range(len(names)))


def stored_eod(path: Path | str) -> int | None:
    """The id of the token that ends a text, from the configuration of an exported folder; None if it names none.

    CheckpointError when the configuration cannot be read.
    """
    config = _read_json(Path(path) / CONFIG_NAME)
    eod = config.get("eos_token_id") if isinstance(config, dict) else None
    return eod if type(eod) is int else None


def open_export(path: Path | str) -> HuggingFaceModel:
    """Read an exported folder. No code in it is run, and transformers is not needed.

    CheckpointError when it does not hold a TokenFormer, or when tensors are missing, unknown, not finite, or of another
    shape or type than expected.
    """
    folder = Path(path)
    if os.path.isfile(folder):
        raise CheckpointError(f"{folder}: is a file. Give the folder that it lies in, {folder.parent}")
    if os.path.lexists(folder / _ADAPTER_NAME) and not os.path.lexists(folder / CONFIG_NAME):
        raise CheckpointError(
            f"{folder}: holds an adapter without its model. Merge it first, with PEFT's merge_and_unload() and then "
            "save_pretrained(), and give the folder that this writes"
        )
    if not os.path.lexists(folder / CONFIG_NAME) and holds_run(folder):
        raise CheckpointError(
            f"{folder}: is a run or a checkpoint of one, not an export, so it is there to be trained on already. Give "
            "it as run.dir to go on, as growth.from to grow it, or as training.init_from to begin with its weights"
        )
    config = _read_json(folder / CONFIG_NAME)
    try:
        model, scales = model_from_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG_NAME}: {error}") from error
    stored = _read_tensors(folder)
    for name, tensor in stored.items():
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{folder}: {name} is of type {_type_name(tensor.dtype)}, expected "
                f"{' or '.join(map(_type_name, _DTYPES))}. Save the model in one of them, neither quantised nor cast"
            )
    table = parameter_table(model)
    if task_of(model).tied:
        _take_head(folder, stored, table[EMBEDDING].huggingface_name)
    expected = {spec.huggingface_name: spec.shape[::-1] if spec.transposed else spec.shape for spec in table.values()}
    _check(folder, {name: tuple(tensor.shape) for name, tensor in stored.items()}, expected)
    weights = {}
    for name, spec in table.items():
        tensor = stored.pop(spec.huggingface_name)  # frees each tensor once it is copied: no second copy of the model
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{folder}: {spec.huggingface_name} holds values that are infinite or no numbers: the training "
                "diverged, or the file is damaged. Give an earlier model, or copy the file again"
            )
        weights[name] = (tensor.mT if spec.transposed else tensor).contiguous()
    return HuggingFaceModel(model, scales, weights)


def _take_head(folder: Path, stored: dict[str, Tensor], embedding: str) -> None:
    """Removes a head stored next to the embedding from `stored`. CheckpointError if the two are not equal."""
    head = stored.pop(_HEAD, None)
    if head is not None and embedding in stored and not _same(head, stored[embedding]):
        raise CheckpointError(
            f"{folder}: {_HEAD} is not {embedding}, and here the output head is the embedding. Give a model that was "
            "trained with the two tied"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(folder: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    if problems := differing_tensors(found, expected, f"{CONFIG_NAME} says"):
        raise CheckpointError(
            f"{folder}: the weights are not those of its {CONFIG_NAME}:{bullets(problems, _LISTED)}"
            + "\nGive the whole folder as it was exported or saved; an adapter has to be merged first."
        )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in _files_of_weights(folder):
        path = folder / name
        with open_safetensors(path, "Give the whole folder", "Copy it again") as file:
            for key in file.keys():
                if key in tensors:
                    raise CheckpointError(f"{path}: holds {key} again, which another file of the folder has")
                tensors[key] = file.get_tensor(key)
    return tensors


def _files_of_weights(folder: Path) -> list[str]:
    index = folder / INDEX_NAME
    if os.path.lexists(folder / WEIGHTS_NAME) or not os.path.lexists(index):
        return [WEIGHTS_NAME]
    found = _read_json(index)
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: has no weight_map of tensors to files")
    for tensor, name in places.items():
        if not _WEIGHTS_FILE.fullmatch(name):
            raise CheckpointError(f"{index}: weight_map.{tensor} is {shown(name)}, which is no safetensors file here")
    return sorted(set(places.values()))


def _read_json(path: Path) -> Any:
    with file_errors(CheckpointError, path, "Give a folder that to-hf or save_pretrained of transformers wrote."):
        content = read_plain(path, _LARGEST_JSON)
    try:
        return parse_json(content, finite=False)
    except NotJsonError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}). Copy it again") from error
