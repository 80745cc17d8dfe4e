"""The places of adapters in a decoder: attention modules, MLPs and linear layers, found by structure, not by name.

The layers are the only list of modules whose length is the number of layers. A child of a layer that has
matrices and children of its own is *attention* if its forward takes a mask or positions, otherwise an *MLP*.
In a TokenFormer, tokens can also be appended to the Pattentions themselves.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_tf.architectures.tokenformer.parameters import PROJECTIONS
from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.nearest import either
from megatron_tf.convert.huggingface.configuration import MODEL_TYPE
from megatron_tf.errors import ArgumentError

ATTENTION = "attention"
MLP = "mlp"
LINEAR = "linear"
PATTENTION = "pattention"
KINDS = (ATTENTION, MLP, LINEAR, PATTENTION)
BRANCH = "pattention_branch"  # the name of a branch, as a child of its module
_POSITIONS = ("mask", "position", "rotary", "alibi", "cache_params")
_LISTED = 4  # names that a message spells out
# name of a Pattention within its layer, in an export -> the kind that its tokens are counted by
_TOKEN_KINDS = {names.huggingface.rpartition(".")[2]: names.tokens for names in PROJECTIONS.values()}


@dataclass(frozen=True)
class Place:
    """A module that can have a branch.

    `argument`: name of its input in its forward.  `d_in`, `d_out`: width of its input and output.
    """

    name: str
    kind: str
    argument: str
    d_in: int
    d_out: int


def find_places(model: nn.Module) -> dict[str, Place]:
    """All places of a decoder, by module name. ArgumentError when its layers cannot be found."""
    config = _text_config(model)
    prefix, layers = _layers(model, config.num_hidden_layers)
    found = {}
    for number, layer in enumerate(layers):
        for name, child in layer.named_children():
            if _is_inner(child):
                kind = ATTENTION if _takes_positions(child) else MLP
                place = f"{prefix}.{number}.{name}"
                found[place] = Place(place, kind, _argument(child), config.hidden_size, config.hidden_size)
        for name, module in layer.named_modules():
            widths = _linear_widths(module)
            if widths is not None and f".{BRANCH}" not in f".{name}":
                place = f"{prefix}.{number}.{name}"
                found[place] = Place(place, LINEAR, _argument(module), *widths)
    return found


def select(model: nn.Module, kinds: Sequence[str]) -> list[Place]:
    """The places of these kinds. ArgumentError for an unknown kind, or one that no layer has."""
    for kind in kinds:
        if kind not in KINDS:
            raise ArgumentError(f"modules: {kind!r} is no kind of module. Choose of {either(KINDS)}.")
    if not kinds or (len(kinds) > 1 and {LINEAR, PATTENTION} & set(kinds)):
        raise ArgumentError(
            f"modules: {list(kinds)}. Give attention, mlp or both, or linear alone, which is the layers within them, "
            "or pattention alone, in a TokenFormer."
        )
    if PATTENTION in kinds:
        return select_projections(model)
    places = find_places(model)
    present = {place.kind for place in places.values()}
    missing = [kind for kind in kinds if kind not in present]
    if missing:
        there = [kind for kind in KINDS if kind in present]
        raise ArgumentError(
            f"modules: {type(model).__name__} has no {either(missing)} module in its layers: a module of linear layers "
            f"below each layer is looked for. {_advice(there)}"
        )
    return [place for place in places.values() if place.kind in kinds]


def select_named(model: nn.Module, targets: Iterable[str]) -> list[Place]:
    """The places whose names end in one of `targets`. ArgumentError for one that names no place, with the near ones."""
    places, found = find_places(model), {}
    for target in targets:
        own = {name: place for name, place in places.items() if name == target or name.endswith(f".{target}")}
        if not own:
            ends = {name.rpartition(".")[2] for name in places}
            near = difflib.get_close_matches(target.rpartition(".")[2], sorted(ends), n=_LISTED, cutoff=0.5)
            raise ArgumentError(
                f"target_modules: {target!r} is no attention module, MLP or linear layer within the layers of "
                f"{type(model).__name__}. Choose of {', '.join(near or sorted(ends))}."
            )
        found.update(own)
    inner = [name for name in found if any(name.startswith(f"{other}.") for other in found)]
    if inner:
        raise ArgumentError(
            f"target_modules: {inner[0]} is within another target. Give either whole modules or their linear layers."
        )
    return list(found.values())


def select_projections(model: nn.Module, targets: Iterable[str] | None = None) -> list[Place]:
    """The Pattentions of a TokenFormer that tokens can be appended to: all, or those whose names end in one of
    `targets`.

    ArgumentError for another model, for an activation with which new tokens change the function, for targets that do
    not exist, and for only some of the projections that share one number of tokens.
    """
    if not is_tokenformer(model):
        raise ArgumentError(
            f"modules: pattention is for TokenFormers, and this is a {type(model).__name__}. Give attention and mlp."
        )
    config = _text_config(model)
    if not ACTIVATIONS[config.activation].ignores_zero:
        raise ArgumentError(
            f"modules: pattention appends tokens with key 0, and in a {config.activation} model these have a weight, "
            "so its function would change. Give attention and mlp."
        )
    found: dict[str, Place] = {}
    for name, module in model.named_modules():
        if hasattr(module, "weigh") and name.rpartition(".")[2] in _TOKEN_KINDS:
            if module.keys is None:
                raise ArgumentError(
                    f"modules: all tokens of {name} are candidates, and pattention needs some that every position "
                    "uses. Give attention and mlp."
                )
            found[name] = Place(name, PATTENTION, _argument(module), config.hidden_size, config.hidden_size)
    return list(found.values()) if targets is None else _whole_kinds(found, list(targets))


def is_tokenformer(model: nn.Module) -> bool:
    """Whether `model` is an exported TokenFormer, loaded by transformers or `load_base`."""
    return getattr(getattr(model, "config", None), "model_type", None) == MODEL_TYPE


def default_kinds(model: nn.Module) -> tuple[str, ...]:
    """The kinds of places by default: the projections of a TokenFormer; in other models attention and MLPs."""
    return (PATTENTION,) if is_tokenformer(model) else (ATTENTION, MLP)


def _whole_kinds(places: dict[str, Place], targets: list[str]) -> list[Place]:
    ends = sorted({name.rpartition(".")[2] for name in places})
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in places):
            raise ArgumentError(
                f"target_modules: {target!r} is no Pattention of this TokenFormer. Choose of {', '.join(ends)}."
            )
    chosen = [name for name in places if any(name == target or name.endswith(f".{target}") for target in targets)]
    kinds = {_TOKEN_KINDS[name.rpartition(".")[2]] for name in chosen}
    left = [name for name in places if _TOKEN_KINDS[name.rpartition(".")[2]] in kinds and name not in chosen]
    if left:
        kind = _TOKEN_KINDS[left[0].rpartition(".")[2]]
        others = [end for end in ends if _TOKEN_KINDS[end] == kind]
        raise ArgumentError(
            f"target_modules: {left[0]} is not among them, and a TokenFormer has one number of {kind} tokens, for "
            f"{' and '.join(others)} of all layers. Give all of them, or none."
        )
    return [places[name] for name in chosen]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's stack of layers. ArgumentError when it cannot be found."""
    return _layers(model, num_layers(model))[1]


def num_layers(model: nn.Module) -> int:
    return _text_config(model).num_hidden_layers


def hidden_size(model: nn.Module) -> int:
    return _text_config(model).hidden_size


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if any(type(getattr(config, name, None)) is not int for name in ("num_hidden_layers", "hidden_size")):
        raise ArgumentError(
            f"model: {type(model).__name__} has no configuration with num_hidden_layers and hidden_size. Give a "
            "decoder of transformers, such as AutoModelForCausalLM.from_pretrained makes."
        )
    return config


def _layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and any(map(_has_matrices, module))
    }
    outer = {name: one for name, one in found.items() if not any(name.startswith(f"{other}.") for other in found)}
    if len(outer) != 1:
        seen = f"{len(outer)} ({', '.join(list(outer)[:_LISTED])})" if outer else "none"
        raise ArgumentError(
            f"model: the layers of {type(model).__name__} are looked for as one list of {count} modules, its "
            f"num_hidden_layers, and {seen} is there. Adapters stand in decoders of one stack of layers."
        )
    return next(iter(outer.items()))


def _is_inner(module: nn.Module) -> bool:
    return _has_matrices(module) and any(name != BRANCH for name, _ in module.named_children())


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 or _is_packed(parameter) for parameter in module.parameters())


def _is_packed(parameter: nn.Parameter) -> bool:
    return not parameter.dtype.is_floating_point


def _linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer, a quantised one too; None for any other module."""
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if type(module).__name__ == "Conv1D":  # of transformers, for the models of the GPT-2 family
        return module.nx, module.nf  # type: ignore[return-value]
    return None


def _takes_positions(module: nn.Module) -> bool:
    names = inspect.signature(module.forward).parameters
    return any(word in name for name in names for word in _POSITIONS)


def _argument(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters))


def _advice(present: Sequence[str]) -> str:
    if not present:
        return "Its layers have no linear layers either: an adapter has no place there."
    return f"Give modules={either([repr([kind]) for kind in present])}."
