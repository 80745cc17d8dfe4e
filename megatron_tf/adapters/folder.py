"""An adapter's folder, in PEFT's layout: adapter_model.safetensors and adapter_config.json.

| field of adapter_config.json | meaning |
|---|---|
| PEFT's own | base_model_name_or_path, task_type and the like |
| format_version | 1; 2 with candidates |
| num_tokens | parameter tokens of each branch |
| candidates, group_size | candidates of each slot, and tokens of each candidate (`model.sparse_pattention`); format 2 |
| frozen_tokens | the number of first tokens that are not trained; they are separate tensors in the weights |
| scale | τ of all branches: stored, not computed from num_tokens, so that growth can keep it; null if appended |
| activation | l2_norm_gelu; that of the base if appended |
| modules, target_modules | kinds of modules, and their names in the base; pattention: appended to a TokenFormer's |
| base | shape and digests of the base's weights, see `fingerprint` |
| history | one entry for each growth or shrinking |
| checksum | SHA-256 of adapter_model.safetensors and of the fields that decide what it computes |

Tensors are `base_model.model.<module>.pattention_branch.<key_tokens or value_tokens>` [num_tokens, width]; the last
part of frozen ones begins with `frozen_`. With candidates, `bank.` stands before the last part, tokens are ordered by
slot, candidate and token, and there are a `router` [slots · candidates, width] and a `balance` [slots · candidates]. No
code in a folder is run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_tf.adapters.modules import BRANCH, KINDS, PATTENTION
from megatron_tf.checkpoint.safetensors_file import open_safetensors
from megatron_tf.checkpoint.strict_json import Fields, NotJsonError, parse_json
from megatron_tf.checks import check_whole_number
from megatron_tf.config.activations import ACTIVATIONS, DEFAULT_ACTIVATION
from megatron_tf.config.nearest import divisors_near, either
from megatron_tf.durable import atomic_folder, open_plain, partial_path, prepare_output, read_plain
from megatron_tf.errors import ArgumentError, CheckpointError, file_errors, shown

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
METHOD = "PATTENTION"  # its name in PEFT
FORMAT_VERSION = 2
DENSE_VERSION = 1  # of adapters without candidates, so that earlier versions can read them
KEYS, VALUES, FROZEN = "key_tokens", "value_tokens", "frozen_"
ROUTER, BALANCE = "router", "balance"
BANK = "bank"  # of a branch with candidates
_IN_BANK = f"{BANK}."
OWN_FIELDS = (
    "format_version", "num_tokens", "frozen_tokens", "scale", "activation", "modules", "target_modules", "base",
    "history", "checksum",
)  # fmt: skip
CHOICE_FIELDS = ("candidates", "group_size")
# the fields that decide the meaning of the weights
COVERED_FIELDS = ("format_version", "num_tokens", "frozen_tokens", "scale", "activation", "target_modules", "base",
                  *CHOICE_FIELDS)  # fmt: skip
PEFT_FIELDS = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type",
)  # fmt: skip
_PREFIX = "base_model.model."
_LARGEST_CONFIG = 2**24
_LISTED = 4
_BLOCK = 2**20


@dataclass(frozen=True)
class Branch:
    """All tokens of one branch: keys [n, d_in], values [n, d_out]; with candidates also router [groups, d_in] and
    balance [groups]."""

    keys: Tensor
    values: Tensor
    router: Tensor | None = None
    balance: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are not None, by the last part of their names."""
        found = {KEYS: self.keys, VALUES: self.values, ROUTER: self.router, BALANCE: self.balance}
        return {leaf: tensor for leaf, tensor in found.items() if tensor is not None}


@dataclass(frozen=True)
class Adapter:
    """`config`: the fields of adapter_config.json.  `branches`: by module name."""

    config: Mapping[str, Any]
    branches: Mapping[str, Branch]


def read_config(path: Path) -> dict[str, Any]:
    """The fields of an adapter_config.json. CheckpointError unless it is a valid one of this method."""
    with file_errors(CheckpointError, path, "Give the folder of a Pattention adapter."):
        content = read_plain(path, _LARGEST_CONFIG)
    try:
        values = parse_json(content)
    except NotJsonError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}). Copy it again") from error
    fields = Fields(str(path), "", values)
    method = fields.text("peft_type")
    if method != METHOD:
        raise fields.error("peft_type", f"is {shown(method)}: the adapter is of another method. Give one of {METHOD}")
    version = fields.integer("format_version", 1)
    if version > FORMAT_VERSION:
        raise fields.error(
            "format_version", f"is {version}, and this megatron_tf knows up to {FORMAT_VERSION}. Install a newer one"
        )
    chooses = version > DENSE_VERSION
    fields.only(*OWN_FIELDS, *PEFT_FIELDS, *(CHOICE_FIELDS if chooses else ()))
    tokens = fields.integer("num_tokens", 1)
    frozen = fields.integer("frozen_tokens")
    if frozen >= tokens:
        raise fields.error("frozen_tokens", f"is {frozen}, and there are {tokens} tokens. One at least is trained")
    if chooses:
        candidates, size = fields.integer("candidates", 2), fields.integer("group_size", 1)
        if tokens % (candidates * size) or frozen or is_appended(values):
            raise fields.error(
                "candidates",
                f"is {candidates} of {size} tokens each, and there are {tokens} tokens, {frozen} of them frozen. "
                "Tokens that positions choose among are whole slots in parallel to a module, none of them frozen",
            )
    appended = is_appended(values)
    activations = ACTIVATIONS.names() if appended else [DEFAULT_ACTIVATION]
    if fields.text("activation") not in activations:
        raise fields.error("activation", f"is {shown(values['activation'])}, expected {' or '.join(activations)}")
    if not appended:
        fields.positive("scale")
    elif values.get("scale", "missing") is not None:
        raise fields.error("scale", "must be null: appended tokens share τ of the base's own")
    for kind in fields.array("modules"):
        if kind not in KINDS:
            raise fields.error("modules", f"holds {shown(kind)}, expected {', '.join(KINDS)}")
    if not fields.array("target_modules") or not all(isinstance(name, str) for name in values["target_modules"]):
        raise fields.error("target_modules", "must be the names of modules")
    fields.plain_objects("history")
    fields.optional_text("checksum")
    base = fields.object("base")
    base.only("model_type", "hidden_size", "num_layers", "vectors", "matrices")
    base.text("model_type")
    base.integer("hidden_size", 1)
    base.integer("num_layers", 1)
    base.optional_text("vectors")
    base.optional_text("matrices")
    return dict(values)


def is_appended(config: Mapping[str, Any]) -> bool:
    """Whether the tokens are appended to those of a TokenFormer, rather than in parallel to a module."""
    return config.get("modules") == [PATTENTION]


def num_candidates(config: Mapping[str, Any]) -> int:
    """Candidates of each slot; 1 without a choice."""
    return config.get("candidates") or 1


def check_group(name: str, used: int, group_size: int | None) -> None:
    """ArgumentError unless `group_size` divides `used`, the tokens that a position uses. `name`: of the argument."""
    check_whole_number(name, group_size, 1)
    assert group_size is not None
    if used % group_size:
        raise ArgumentError(
            f"{name}: {group_size} does not divide the {used} tokens that a position uses. Set it to "
            f"{either(divisors_near(used, group_size))}."
        )


def check_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """CheckpointError unless the weights in `folder` match the checksum in its configuration."""
    path = folder / WEIGHTS_NAME
    with file_errors(CheckpointError, path, "Give the whole folder."):
        found = checksum(path, config)
    if found != config["checksum"]:
        raise CheckpointError(
            f"{folder}: the checksum of {WEIGHTS_NAME} and {CONFIG_NAME} is {found}, expected {config['checksum']}. "
            "The adapter is damaged or was changed by hand, or its two files are of two adapters: copy both again"
        )


def checksum(weights: Path, config: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal digits, of a file of weights and of COVERED_FIELDS. OSError when it cannot be read."""
    digest = hashlib.sha256(
        json.dumps({name: config[name] for name in COVERED_FIELDS if name in config}, sort_keys=True).encode()
    )
    with open_plain(weights) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder. CheckpointError unless fields, checksum, and names and shapes of tensors are right."""
    config = read_config(folder / CONFIG_NAME)
    check_weights(folder, config)
    path = folder / WEIGHTS_NAME
    with open_safetensors(path, "Give the whole folder", "Copy it again") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return Adapter(config, dict(_branches(path, config, tensors)))


def write_adapter(folder: Path, adapter: Adapter, complete: Callable[[Path], None] | None = None) -> int:
    """Write a new folder, whole or not at all, and return the bytes of its weights. CheckpointError when it exists.

    `complete`: is called with the folder while it still has a temporary name, to check it or add files. If it raises,
    no folder is left.
    """
    check_new_folder(folder)
    frozen, tensors = adapter.config["frozen_tokens"], {}
    for module, branch in adapter.branches.items():
        for leaf, tokens in branch.tensors().items():
            tensors[tensor_name(module, leaf if branch.router is None else _IN_BANK + leaf)] = tokens[
                frozen:
            ].contiguous()
            if frozen:
                tensors[tensor_name(module, FROZEN + leaf)] = tokens[:frozen].contiguous()
    with file_errors(CheckpointError, folder, "Nothing was written."), atomic_folder(folder) as partial:
        path = partial / WEIGHTS_NAME
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise CheckpointError(f"{path}: {error}. Nothing was written.") from error
        config = {**adapter.config, "checksum": checksum(path, adapter.config)}
        write_config(partial / CONFIG_NAME, config)
        shutil.copymode(partial / CONFIG_NAME, path)  # safetensors lets only the owner read its files
        if complete is not None:
            complete(partial)
        return path.stat().st_size


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_new_folder(folder: Path) -> None:
    """CheckpointError when the folder exists or cannot be made. Makes its parent folders."""
    check_absent(folder)
    prepare_output(folder)


def check_absent(folder: Path) -> None:
    """CheckpointError when the folder, or its temporary name, exists. Nothing is written."""
    for place in (folder, partial_path(folder)):
        if os.path.lexists(place):
            raise CheckpointError(f"{place}: exists already. Nothing is overwritten: remove it, or give another folder")


def tensor_name(module: str, leaf: str) -> str:
    return f"{_PREFIX}{module}.{BRANCH}.{leaf}"


def _rows(config: Mapping[str, Any]) -> dict[str, int]:
    """Rows of each tensor of a branch, by the last parts of its name. Keys and values alternate."""
    frozen, tokens = config["frozen_tokens"], config["num_tokens"]
    if num_candidates(config) > 1:
        groups = tokens // config["group_size"]
        return {
            _IN_BANK + KEYS: tokens,
            _IN_BANK + VALUES: tokens,
            _IN_BANK + ROUTER: groups,
            _IN_BANK + BALANCE: groups,
        }
    of_frozen = {FROZEN + KEYS: frozen, FROZEN + VALUES: frozen} if frozen else {}
    return {**of_frozen, KEYS: tokens - frozen, VALUES: tokens - frozen}


def _branches(path: Path, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> Iterator[tuple[str, Branch]]:
    rows, chooses = _rows(config), num_candidates(config) > 1
    ending = f".{BRANCH}.{_IN_BANK * chooses}{KEYS}"
    modules = [name.removeprefix(_PREFIX).removesuffix(ending) for name in tensors if name.endswith(ending)]
    expected = {tensor_name(module, leaf) for module in modules for leaf in rows}
    if not modules or expected != set(tensors):
        odd = sorted(expected ^ set(tensors))
        raise CheckpointError(
            f"{path}: the tensors are not those of an adapter of {config['num_tokens']} tokens, "
            f"{config['frozen_tokens']} of them frozen: {', '.join(odd[:_LISTED]) or 'there are none'}. Copy the "
            "folder again"
        )
    for module in modules:
        for leaf, count in rows.items():
            tensor = tensors[tensor_name(module, leaf)]
            dimensions = 1 if leaf.endswith(BALANCE) else 2
            if tensor.dim() != dimensions or tensor.shape[0] != count or not tensor.dtype.is_floating_point:
                raise CheckpointError(
                    f"{path}: {tensor_name(module, leaf)} is {list(tensor.shape)}, and its {CONFIG_NAME} says {count} "
                    f"{'tokens' if leaf.endswith('_tokens') else 'candidates'}. Copy the folder again"
                )
        found = [tensors[tensor_name(module, leaf)] for leaf in rows]
        if chooses:
            yield module, Branch(*found)
        else:
            yield module, Branch(torch.cat(found[0::2]), torch.cat(found[1::2]))
