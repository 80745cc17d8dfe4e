"""A base model and an adapter as one folder that transformers loads, with the code of the branches in it.

| file | content |
|---|---|
| model.safetensors, or several files | the base's weights in their own type, and the adapter's tokens |
| config.json | the base's, with the branches in `pattention` |
| modeling_pattention_adapter.py | the base's class with branches; needs only torch and transformers |
| other files | the base's tokenizer and generation settings |
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_tf.adapters.folder import CHOICE_FIELDS, Adapter, is_appended, read_adapter
from megatron_tf.adapters.loading import load_adapted, load_base, load_exported, random_ids
from megatron_tf.adapters.modules import BRANCH, find_places
from megatron_tf.convert.agreement import Agreement, agreement
from megatron_tf.convert.huggingface.verify import verified_with, verifying_versions
from megatron_tf.durable import atomic_folder
from megatron_tf.errors import CheckpointError, file_errors

MODELING_CODE = "modeling_pattention_adapter.py"
_CLASSES = {"AutoModel": "PattentionAdapterModel", "AutoModelForCausalLM": "PattentionAdapterForCausalLM"}
_BASE_LINE = "from transformers import PreTrainedModel as "
_PROMPT, _NEW = 6, 4  # tokens; two new ones would do to notice a cache that is not read
_CACHES: dict[str, dict[str, Any]] = {"without a cache": {"use_cache": False}, "with a cache": {}}
_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "spiece.model",
)  # fmt: skip


def export_adapter(base: Path, adapter: Path, target: Path) -> dict[str, Agreement]:
    """Write the folder `target`, load it as a user would, and compare it with base and adapter.

    Returns the agreement on each kind of sample. CheckpointError, with nothing left behind, when it cannot be written
    or does not agree.
    """
    stored = read_adapter(adapter)
    if is_appended(stored.config):
        raise CheckpointError(
            f"{adapter}: its tokens are a TokenFormer's. Merge them into it, with `megatron_tf merge-adapter`, which "
            "writes a folder of the usual kind"
        )
    model = load_base(base, "auto")
    bases = {"BaseForCausalLM": type(model).__name__, "BaseModel": type(model.base_model).__name__}
    settings = _settings(stored, model)
    versions = verifying_versions()
    _add_tokens(model, stored, settings)
    with file_errors(CheckpointError, target, "Nothing was written."), atomic_folder(target) as folder:
        # The names in memory are kept, because transformers does not translate names for a class with remote code.
        model.save_pretrained(folder, save_original_format=False)
        del model
        _write_code(folder, bases, versions)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config |= {
            "architectures": [_CLASSES["AutoModelForCausalLM"]],
            "auto_map": {kind: f"{MODELING_CODE.removesuffix('.py')}.{name}" for kind, name in _CLASSES.items()},
            "pattention": settings,
            "verified_with": versions,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for weights in folder.glob("*.safetensors"):
            shutil.copymode(folder / "config.json", weights)  # safetensors lets only the owner read its files
        for pattern in _TOKENIZER_FILES:
            for file in base.glob(pattern):
                shutil.copyfile(file, folder / file.name)
        return verify(folder, base, adapter)


@torch.no_grad()
def verify(folder: Path, base: Path, adapter: Path) -> dict[str, Agreement]:
    """Compare logits, and generation with and without a cache, in fp32. CheckpointError when one does not agree."""
    expected = load_adapted(load_base(base), {"default": adapter})
    exported = load_exported(folder)
    ids = random_ids(expected)

    found = {"random tokens": agreement(exported(input_ids=ids).logits.float(), expected(input_ids=ids).logits.float())}
    for cache, options in _CACHES.items():
        found[f"generation {cache}"] = _generation(exported, expected, ids[:, :_PROMPT], options)
    for kind, one in found.items():
        if not one.holds:
            raise CheckpointError(
                f"transformers computes another function from the export than base and adapter do: on {kind}, {one}. "
                "Nothing was written. Please report this, with the versions of torch and transformers"
            )
    return found


def _generation(exported: Any, expected: Any, ids: Tensor, options: Mapping[str, Any]) -> Agreement:
    """Agreement of the logits of `exported` while it continues `ids` [2, s] with those of `expected` on the whole
    texts, without a cache. Logits are compared rather than tokens, because rounding decides between tokens that are
    about equally likely."""
    out = exported.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=_NEW, max_new_tokens=_NEW,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    whole = expected(input_ids=out.sequences[:, :-1]).logits.float()
    return agreement(torch.stack(out.logits, 1).float(), whole[:, ids.shape[1] - 1 :])


def _settings(adapter: Adapter, model: nn.Module) -> dict[str, Any]:
    places = find_places(model)
    unknown = [name for name in adapter.branches if name not in places]
    if unknown:
        raise CheckpointError(
            f"the adapter has a branch at {unknown[0]}, which {type(model).__name__} does not have. Give the model "
            "that it was trained on"
        )
    return {
        "num_tokens": adapter.config["num_tokens"],
        "scale": adapter.config["scale"],
        **{key: adapter.config[key] for key in CHOICE_FIELDS if key in adapter.config},
        "branches": {name: [places[name].d_in, places[name].d_out, places[name].argument] for name in adapter.branches},
    }


def _add_tokens(model: nn.Module, adapter: Adapter, settings: dict[str, Any]) -> None:
    from megatron_tf.adapters.remote_code.modeling_pattention_adapter import add_branches  # imports transformers

    add_branches(model, settings)
    for name, branch in adapter.branches.items():
        added: Any = getattr(model.get_submodule(name), BRANCH)
        for leaf, tensor in branch.tensors().items():
            getattr(added, leaf).data = tensor


def _write_code(folder: Path, bases: Mapping[str, str], versions: dict[str, str]) -> None:
    """`bases`: the names, in transformers, of the classes that those of the code derive from, by their names there."""
    import transformers

    code = resources.files("megatron_tf.adapters") / "remote_code" / MODELING_CODE
    text = code.read_text(encoding="utf-8")
    for name, kind in bases.items():
        if not hasattr(transformers, kind):
            raise CheckpointError(
                f"the base is a {kind}, which is no class of transformers: it cannot be exported with it. Keep base "
                "and adapter as two folders; of a TokenFormer, an adapter that appends tokens (adapter.modules "
                "[pattention]) can be merged"
            )
        assert text.count(f"{_BASE_LINE}{name}\n") == 1
        text = text.replace(f"{_BASE_LINE}{name}\n", f"from transformers import {kind} as {name}\n")
    (folder / MODELING_CODE).write_text(f"{verified_with(versions)}.\n{text}", encoding="utf-8")
