"""Adapters in vLLM: a plugin (`vllm.general_plugins`). Neither the base's folder nor vLLM is changed.

The model is vLLM's own class of the base, with branches at its attention modules and MLPs by the code that exports use.
Two fields of its configuration select it: architectures ["Pattention" + the base's], and the adapter's folder in
`pattention_adapter`. Tokens have the model's type. Each rank of a tensor-parallel group has some of the tokens, because
inputs and outputs of these modules are whole on each rank. The squared norm of a position's scores, one number, and the
branch's output are summed over the ranks, as in `model.pattention`.

A server has one adapter, because vLLM does not tell a model which request a position belongs to, except for LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_tf.adapters.folder import CHOICE_FIELDS, KEYS, VALUES, Adapter, is_appended, num_candidates, read_adapter
from megatron_tf.adapters.modules import ATTENTION, BRANCH, MLP
from megatron_tf.config.nearest import either
from megatron_tf.errors import CheckpointError, shown
from megatron_tf.state.parameters import shard_range

# Decoders whose layers have the same names in vLLM and in transformers; each is tested.
BASES = ("LlamaForCausalLM", "Qwen3ForCausalLM")
_PREFIX = "Pattention"
_INPUT = "hidden_states"


def register() -> None:
    """Registers the models. vLLM calls it in each of its processes."""
    from vllm import ModelRegistry

    for name in sorted({*BASES} & {*ModelRegistry.get_supported_archs()}):
        ModelRegistry.register_model(_PREFIX + name, f"{__name__}:{_PREFIX}{name}")


def __getattr__(name: str) -> Any:
    base = name.removeprefix(_PREFIX)
    if base == name or base not in BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _adapted(base)


@cache
def _adapted(name: str) -> type[nn.Module]:
    from vllm import ModelRegistry

    base: Any = ModelRegistry.models[name].load_model_cls()

    class Adapted(base):
        def __init__(self, *, vllm_config: Any, prefix: str = ""):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            config = vllm_config.model_config.hf_config
            if vllm_config.parallel_config.pipeline_parallel_size > 1:
                raise CheckpointError(
                    "pipeline_parallel_size: a base with an adapter is served on 1 stage. Set it to 1"
                )
            self.adapter_parameters = add_adapter(self, configured_folder(config), config, _tensor_ranks())

        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            return set(super().load_weights(weights)) | self.adapter_parameters  # these are there already

    Adapted.__name__ = Adapted.__qualname__ = _PREFIX + name
    return Adapted


def configured_folder(config: Any) -> Path:
    """The folder that `pattention_adapter` of the model's configuration names. CheckpointError when none is named."""
    folder = getattr(config, "pattention_adapter", None)
    if not isinstance(folder, str) or not folder:
        raise CheckpointError(
            f"pattention_adapter: is {shown(folder)}, and the adapter's folder is expected. Give it next to "
            "architectures, in --hf-overrides"
        )
    return Path(folder)


@dataclass(frozen=True)
class Ranks:
    """The ranks that each have some of the tokens.  `reduce`: returns the sum of a tensor over them, a new tensor."""

    size: int = 1
    rank: int = 0
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor


ALONE = Ranks()


def _tensor_ranks() -> Ranks:
    from vllm import distributed

    size, rank = distributed.get_tensor_model_parallel_world_size(), distributed.get_tensor_model_parallel_rank()
    return Ranks(size, rank, distributed.tensor_model_parallel_all_reduce)


@torch.no_grad()
def add_adapter(model: nn.Module, folder: Path, config: Any, ranks: Ranks = ALONE) -> set[str]:
    """Put the branches of the adapter in `folder` into `model`, with this rank's tokens, and return the names of their
    parameters. CheckpointError when the model cannot have them, or when its `config`, that of transformers, has other
    sizes than the adapter's base."""
    from megatron_tf.adapters.remote_code.modeling_pattention_adapter import add_branches  # imports transformers

    adapter = read_adapter(folder)
    _check(folder, adapter, config)
    widths = {name: [one.keys.shape[1], one.values.shape[1], _INPUT] for name, one in adapter.branches.items()}
    size = adapter.config.get("group_size") or 1
    slot = num_candidates(adapter.config) * size  # a rank has whole ones
    first, last = shard_range(adapter.config["num_tokens"] // slot, ranks.size, ranks.rank)
    choice = {key: adapter.config[key] for key in CHOICE_FIELDS if key in adapter.config}
    settings = {"num_tokens": (last - first) * slot, "scale": adapter.config["scale"], "branches": widths, **choice}
    add_branches(model, settings, partial(_over, ranks))
    added = set()
    for name, branch in adapter.branches.items():
        own: Any = model.get_submodule(f"{name}.{BRANCH}")
        for leaf, tensor in branch.tensors().items():
            rows = slot if leaf in (KEYS, VALUES) else slot // size
            getattr(own, leaf).copy_(tensor[first * rows : last * rows])
        own.requires_grad_(False)
        added |= {f"{name}.{BRANCH}.{leaf}" for leaf, _ in own.named_parameters()}
    return added


def _over(ranks: Ranks, kind: Any) -> Any:
    """The class of branches whose tokens are divided among `ranks`."""

    class SharedBranch(kind):
        def norm(self, scores: Tensor) -> Tensor:
            return ranks.reduce(super().norm(scores).square()).sqrt()

        def total(self, output: Tensor) -> Tensor:
            return ranks.reduce(output)

    return kind if ranks.size == 1 else SharedBranch


def _check(folder: Path, adapter: Adapter, config: Any) -> None:
    if is_appended(adapter.config):
        raise CheckpointError(f"{folder}: its tokens are a TokenFormer's. Merge it, with `megatron_tf merge-adapter`")
    others = set(adapter.config["modules"]) - {ATTENTION, MLP}
    if others:
        raise CheckpointError(
            f"{folder}: has branches at {either(sorted(others))} layers, some of which vLLM joins into one. Give an "
            "adapter at attention modules and MLPs, or serve an export with --model-impl transformers"
        )
    base = adapter.config["base"]
    found = {"model_type": config.model_type, "hidden_size": config.hidden_size, "num_layers": config.num_hidden_layers}
    for key, value in found.items():
        if base[key] != value:
            raise CheckpointError(
                f"{folder}: was trained on a base whose {key} is {base[key]}, and this one's is {value}. Give the "
                "model that it was trained on"
            )
