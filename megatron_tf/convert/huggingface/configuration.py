"""Converts the model section of a configuration, with τ of every projection, to an export's config.json and back."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from megatron_tf.architectures.tokenformer.parameters import PROJECTIONS
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.load import read_model
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import CheckpointError, ConfigError, shown
from megatron_tf.telemetry.text import bullets

MODEL_TYPE, IMAGE_MODEL_TYPE = "tokenformer", "tokenformer_image"
CONFIGURATION_CODE = "configuration_tokenformer.py"
MODELING_CODE = "modeling_tokenformer.py"
CODE = (CONFIGURATION_CODE, MODELING_CODE, "pattention_tokenformer.py")
# field of our model section -> key of config.json
_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "seq_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "parameter_tokens": "parameter_tokens",
    "sparse": "sparse",
    "activation": "activation",
    "rotary_fraction": "rotary_fraction",
    "rotary_base": "rotary_base",
    "norm_eps": "layer_norm_eps",
}
# the same for a classifier of images
IMAGE_KEYS = {
    "architecture": "block_type",
    "image": "image",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
    "parameter_tokens": "parameter_tokens",
    "sparse": "sparse",
    "activation": "activation",
    "ffn_hidden_size": "intermediate_size",
    "num_key_value_heads": "num_key_value_heads",
}
_TYPES = {MODEL_TYPE: ("language_model", _KEYS), IMAGE_MODEL_TYPE: ("image_classification", IMAGE_KEYS)}
# Fields that config.json leaves out where they are null or belong to the other architecture.
_OPTIONAL = {"sparse"}
_IMAGE_OPTIONAL = {*_OPTIONAL, "parameter_tokens", "activation", "ffn_hidden_size", "num_key_value_heads"}
_AS_WRITTEN = "Give the one that to-hf or save_pretrained wrote."


def huggingface_config(model: Model, scales: Mapping[str, float], eod_id: int | None) -> dict[str, Any]:
    """The content of config.json. `eod_id`: the token that ends a document; None when the tokenizer is not known."""
    classes = {
        "AutoConfig": (CONFIGURATION_CODE, "TokenFormerConfig"),
        "AutoModel": (MODELING_CODE, "TokenFormerModel"),  # vLLM builds from it
        "AutoModelForCausalLM": (MODELING_CODE, "TokenFormerForCausalLM"),
    }
    return {
        "architectures": ["TokenFormerForCausalLM"],
        "auto_map": {kind: f"{code.removesuffix('.py')}.{name}" for kind, (code, name) in classes.items()},
        "model_type": MODEL_TYPE,
        "dtype": "float32",
        "tie_word_embeddings": True,
        **special_tokens(eod_id),
        **under_keys(model, _KEYS),
        **scales_by_layer(model, scales),
    }


def under_keys(model: Model, keys: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `model` that `keys` name, under their keys of config.json, without those that are null."""
    values = model.model_dump(mode="json", exclude_none=True)
    if (sections := architecture_of(model).sparse_sections(model)) is not None:
        values["sparse"] = sections  # without the losses of training, which an export does not need
    return {key: values[field] for field, key in keys.items() if field in values}


def scales_by_layer(model: Model, scales: Mapping[str, float]) -> dict[str, Any]:
    """{"scales": for each layer, projection -> τ}; {} for a model without projections."""
    if not scales:
        return {}
    layers = range(model.num_layers)
    return {
        "scales": [
            {_short(projection): scales[f"blocks.{layer}.{projection}"] for projection in PROJECTIONS}
            for layer in layers
        ]
    }


def special_tokens(eod_id: int | None) -> dict[str, int]:
    """Ids of special tokens. One token begins documents, ends them and pads; padding is never attended to."""
    return {} if eod_id is None else {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id}


def model_from_config(config: Any) -> tuple[Model, dict[str, float]]:
    """(model section, τ by the name of each projection) from the content of a config.json. Unknown keys are ignored.

    CheckpointError, with all problems, when it is not that of a TokenFormer, or is incomplete or invalid.
    """
    kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
    if not isinstance(config, dict) or kind not in _TYPES:
        expected = " or ".join(map(repr, _TYPES))
        raise CheckpointError(f"is of a model of type {shown(kind)}, expected {expected}. Give a TokenFormer's")
    task, keys = _TYPES[kind]
    is_image, has_scales = kind == IMAGE_MODEL_TYPE, config.get("block_type") != "transformer"
    optional = _IMAGE_OPTIONAL if is_image else _OPTIONAL
    needed = [key for field, key in keys.items() if field not in optional] + ["scales"] * has_scales
    problems = [f"{key}: missing. {_AS_WRITTEN}" for key in needed if key not in config]
    if problems:
        raise CheckpointError(_listed(problems))
    if not is_image and config.get("tie_word_embeddings", True) is not True:
        raise CheckpointError(
            "has an output head of its own, and here the head is the embedding. Give a model with tie_word_embeddings "
            "true"
        )
    values = {field: config[key] for field, key in keys.items() if config.get(key) is not None}
    try:
        model = read_model({"task": task, **values})
    except ConfigError as error:
        raise CheckpointError(_listed([_under_its_keys(problem, keys) for problem in error.problems])) from None
    return model, _scales(config["scales"], model) if has_scales else {}


def _scales(stored: Any, model: Model) -> dict[str, float]:
    names = {_short(projection): projection for projection in PROJECTIONS}
    if not isinstance(stored, list):
        raise CheckpointError(f"scales: {shown(stored)} is no list, with an item for each layer. {_AS_WRITTEN}")
    if len(stored) != model.num_layers:
        raise CheckpointError(f"scales: are of {len(stored)} layers, the model has {model.num_layers}. {_AS_WRITTEN}")
    scales = {}
    for number, layer in enumerate(stored):
        if not isinstance(layer, dict) or set(layer) != set(names):
            raise CheckpointError(f"scales[{number}]: must have the keys {', '.join(names)}. {_AS_WRITTEN}")
        for name, scale in layer.items():
            if type(scale) not in (int, float) or not 0 < scale <= sys.float_info.max:
                raise CheckpointError(f"scales[{number}].{name}: {scale!r} is no finite number above 0. {_AS_WRITTEN}")
            scales[f"blocks.{number}.{names[name]}"] = float(scale)
    return scales


def _under_its_keys(problem: str, keys: Mapping[str, str]) -> str:
    """`problem`, a sentence about our model section, with the keys of config.json."""
    return re.sub(r"\bmodel\.(\w+)", lambda key: keys.get(key[1], key[1]), problem)


def _short(projection: str) -> str:
    """The last part of a projection's Hugging Face name, by which the remote code knows it within its layer."""
    return PROJECTIONS[projection].huggingface.rpartition(".")[2]


def _listed(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else bullets(problems)
