"""The PEFT method: `PattentionConfig` for get_peft_model, PeftModel.from_pretrained, Trainer and the like."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import PeftType, register_peft_method
from torch import nn

from megatron_tf.adapters.branch import AppendedLayer, PattentionLayer, TokenLayer
from megatron_tf.adapters.fingerprint import base_facts, check_base
from megatron_tf.adapters.folder import (
    BALANCE,
    CHOICE_FIELDS,
    CONFIG_NAME,
    DENSE_VERSION,
    FORMAT_VERSION,
    FROZEN,
    KEYS,
    METHOD,
    ROUTER,
    VALUES,
    WEIGHTS_NAME,
    Adapter,
    Branch,
    check_group,
    check_weights,
    checksum,
    read_config,
    write_config,
)
from megatron_tf.adapters.modules import (
    ATTENTION,
    BRANCH,
    LINEAR,
    MLP,
    PATTENTION,
    Place,
    select,
    select_named,
    select_projections,
)
from megatron_tf.checks import check_choice, check_scale, check_whole_number
from megatron_tf.config.activations import ACTIVATIONS, DEFAULT_ACTIVATION
from megatron_tf.durable import atomic_path
from megatron_tf.errors import ArgumentError, shown
from megatron_tf.state.parameters import default_scale

_NAMES = {KEYS: "keys", VALUES: "values", ROUTER: "router", BALANCE: "balance"}  # in a folder -> of a `Branch`
_HUB_FOLDER = "snapshots"
_ANY_BASE = ", or set base=None in the adapter's PattentionConfig and give that to PeftModel.from_pretrained as config"


def _check_names(name: str, value: Any) -> None:
    """ArgumentError unless `value` is a text or several."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Collection) or not texts or not all(isinstance(text, str) for text in texts):
        raise ArgumentError(f"{name}: {shown(value)}, but a name or a list of names is expected.")


@dataclass
class PattentionConfig(PeftConfig):
    """Parameter tokens in parallel to modules of a decoder. ArgumentError for values that do not fit together.

    `num_tokens`: of each branch.  `modules`: "attention", "mlp" or both, whole modules; or "linear", each linear layer
        within them.  `target_modules`: names of modules or linear layers instead.
    `candidates`: of each slot, one of which a position uses, so num_tokens / candidates tokens in all. 1: it uses all
        tokens.  `group_size`: tokens of a candidate.
    `frozen_tokens`: the number of first tokens that are not trained.  `scale`: τ; the default is √ of the number of
        tokens that a position uses.
    `base`: facts of the base that the adapter was trained on, filled in; None accepts any base.  The other fields are
        those of the folder, see `folder`.
    """

    num_tokens: int = 64
    modules: list[str] | str = field(default_factory=lambda: [ATTENTION, MLP])
    target_modules: list[str] | set[str] | str | None = None
    candidates: int = 1
    group_size: int | None = None
    frozen_tokens: int = 0
    scale: float | None = None
    activation: str = DEFAULT_ACTIVATION
    base: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = DENSE_VERSION
    checksum: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[METHOD]
        _check_names("modules", self.modules)
        if self.target_modules is not None:
            _check_names("target_modules", self.target_modules)
        self.modules = [self.modules] if isinstance(self.modules, str) else list(self.modules)
        is_appended = self.modules == [PATTENTION]
        check_choice("activation", self.activation, ACTIVATIONS.names() if is_appended else [DEFAULT_ACTIVATION])
        check_whole_number("num_tokens", self.num_tokens, 1)
        check_whole_number("frozen_tokens", self.frozen_tokens, 0, self.num_tokens - 1)
        check_whole_number("format_version", self.format_version, 1, FORMAT_VERSION)
        self._check_candidates(is_appended)
        if is_appended and self.scale is not None:
            raise ArgumentError(f"scale: {self.scale:g}, and appended tokens share τ of the base's own. Leave it out.")
        if not is_appended:
            used = self.num_tokens // self.candidates
            self.scale = default_scale(used, self.activation) if self.scale is None else self.scale
            check_scale("scale", self.scale)
        if self.target_modules == "all-linear":
            self.modules, self.target_modules = [LINEAR], None
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]

    def _check_candidates(self, is_appended: bool) -> None:
        check_whole_number("candidates", self.candidates, 1)
        self.format_version = DENSE_VERSION if self.candidates == 1 else FORMAT_VERSION
        if self.candidates == 1:
            return
        if is_appended:
            raise ArgumentError(
                f"candidates: {self.candidates}, and positions use all tokens that are appended to a TokenFormer's. "
                "Leave it out."
            )
        check_group("group_size", self.num_tokens // self.candidates, self.group_size)
        if self.num_tokens % self.candidates or self.frozen_tokens:
            raise ArgumentError(
                f"candidates: {self.candidates}, and there are {self.num_tokens} tokens, {self.frozen_tokens} of them "
                f"frozen. Set num_tokens to a multiple of {self.candidates}, and frozen_tokens to 0."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields to write; those on candidates only if there are candidates."""
        fields = super().to_dict()
        return (
            fields if self.candidates > 1 else {key: value for key, value in fields.items() if key not in CHOICE_FIELDS}
        )

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """The fields of an adapter_config.json, after its checksum has been compared with the weights next to it."""
        path = Path(path_json_file)
        config = read_config(path)
        # From the hub, whose cache has such a folder, the configuration comes before the weights.
        if os.path.lexists(path.parent / WEIGHTS_NAME) or _HUB_FOLDER not in path.parts:
            check_weights(path.parent, config)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, for the weights that PEFT has written next to it."""
        weights = Path(save_directory) / WEIGHTS_NAME
        if not weights.is_file():
            raise ArgumentError(
                f"{weights}: is not there, and the configuration holds its checksum. Save the model, with "
                "save_pretrained and without safe_serialization=False."
            )
        fields = self.to_dict()
        fields["auto_mapping"] = kwargs.get("auto_mapping_dict") or fields["auto_mapping"]
        fields["target_modules"] = sorted(self.target_modules or ())
        fields["checksum"] = checksum(weights, fields)
        with atomic_path(Path(save_directory) / CONFIG_NAME) as partial:
            write_config(partial, fields)


class PattentionModel(BaseTuner):
    """Adds the branches of a `PattentionConfig` to a decoder and takes them out again."""

    prefix = "pattention_"
    tuner_layer_cls = TokenLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """Sets `target_modules` to full names. Finds all errors before anything is added."""
        if peft_config.base is not None:
            check_base(self.model, peft_config.base, otherwise=_ANY_BASE)
        if peft_config.modules == [PATTENTION]:
            places = select_projections(self.model, peft_config.target_modules)
            peft_config.activation = self.model.config.activation
        elif peft_config.target_modules is None:
            places = select(self.model, peft_config.modules)
        else:
            places = select_named(self.model, peft_config.target_modules)
            peft_config.modules = sorted({place.kind for place in places})
        for place in places:
            layer = getattr(self.model.get_submodule(place.name), BRANCH, None)
            if layer is not None and type(layer) is not _layer_class(place):
                raise ArgumentError(
                    f"modules: {place.name} has a branch of another kind already, of an adapter that is loaded. Load "
                    "this one on a base of its own."
                )
        peft_config.base = peft_config.base or base_facts(self.model)
        peft_config.target_modules = {place.name for place in places}
        self._places: dict[str, Place] = {place.name: place for place in places}
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        place = self._places[current_key]
        layer: Any = getattr(target, BRANCH, None) or _layer_class(place)(target, place)
        tokens, scale = peft_config.num_tokens, peft_config.scale
        if peft_config.candidates > 1:
            layer.update_choice(adapter_name, tokens, peft_config.candidates, peft_config.group_size, scale)
        else:
            layer.update_layer(adapter_name, tokens, peft_config.frozen_tokens, scale)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def _check_merge_allowed(self) -> NoReturn:
        if all(config.modules == [PATTENTION] for config in self.peft_config.values()):
            raise ArgumentError(
                "merge: `megatron_tf merge-adapter` puts the tokens of a saved adapter into its TokenFormer, which "
                "gets another configuration by it, and unload() takes the adapter out."
            )
        raise ArgumentError(
            "merge: a Pattention is no linear function of its input, so no weight of the base equals it. "
            "`megatron_tf export-adapter` writes base and adapter as one folder, and unload() takes the adapter out."
        )

    def _unload_and_optionally_merge(self, merge: bool = True, **options: Any) -> nn.Module:
        if merge:
            self._check_merge_allowed()
        for module in list(self.model.modules()):
            layer = getattr(module, BRANCH, None)
            if isinstance(layer, TokenLayer):
                layer.remove(module)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


def _layer_class(place: Place) -> type[TokenLayer]:
    return AppendedLayer if place.kind == PATTENTION else PattentionLayer


def with_adapters(base: nn.Module, folders: Mapping[str, Path], trained: bool = False) -> Any:
    """`base` with the adapters in `folders` by name, the first one active. `trained`: whether they can be trained.
    ArgumentError when it is not the base of all of them."""
    # PEFT's hook checks it too, but with a remedy for Python, and only after the first adapters are added.
    for place in folders.values():
        check_base(base, read_config(place / CONFIG_NAME)["base"])
    (first, folder), *others = folders.items()
    model = PeftModel.from_pretrained(base, folder, adapter_name=first, is_trainable=trained)
    for name, place in others:
        model.load_adapter(place, adapter_name=name, is_trainable=trained)
    return model


def with_new_adapter(base: nn.Module, num_tokens: int, modules: Sequence[str]) -> Any:
    """`base` with a new adapter, to be trained."""
    return get_peft_model(base, PattentionConfig(num_tokens=num_tokens, modules=list(modules), task_type="CAUSAL_LM"))


@torch.no_grad()
def adapter_of(model: Any, name: str = "default") -> Adapter:
    """A copy of an adapter of a PEFT model, on the CPU. If it is sharded, all ranks call it together."""
    config: PattentionConfig = model.peft_config[name]
    fields = config.to_dict() | {"target_modules": sorted(config.target_modules or ()), "inference_mode": True}
    branches = {}
    for place, module in model.get_base_model().named_modules():
        layer = getattr(module, BRANCH, None)
        if isinstance(layer, TokenLayer) and name in layer.scales:
            branches[place] = Branch(**_copied(layer, name))
    return Adapter(fields, branches)


def _copied(layer: TokenLayer, name: str) -> dict[str, torch.Tensor]:
    """The tensors of an adapter by their names in `Branch`, frozen tokens first."""
    if name in layer.choices:
        bank = layer.choices[name].bank
        return {of: _whole([getattr(bank, leaf)]) for leaf, of in _NAMES.items()}
    return {
        _NAMES[leaf]: _whole(
            [tokens[name] for prefix in (FROZEN, "") if name in (tokens := getattr(layer, prefix + leaf))]
        )
        for leaf in (KEYS, VALUES)
    }


def _whole(parts: Sequence[Any]) -> torch.Tensor:
    return torch.cat([(part.full_tensor() if hasattr(part, "full_tensor") else part).cpu() for part in parts]).clone()


def _register() -> None:
    """Adds this method to PEFT's enumeration of methods, which cannot be extended by inheritance."""
    if METHOD in PeftType.__members__:
        return
    member = str.__new__(PeftType, METHOD)
    member._name_ = member._value_ = METHOD
    type.__setattr__(PeftType, METHOD, member)
    PeftType._member_names_.append(METHOD)
    PeftType._member_map_[METHOD] = member
    PeftType._value2member_map_[METHOD] = member
    register_peft_method(name=METHOD.lower(), config_cls=PattentionConfig, model_cls=PattentionModel)


_register()
