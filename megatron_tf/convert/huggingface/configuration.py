"""Between the model section of a configuration and the config.json of an export; τ of every projection goes along."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any

from megatron_tf.architectures.tokenformer.parameters import PROJECTIONS
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.load import read_model
from megatron_tf.config.schema import Model
from megatron_tf.errors import CheckpointError, ConfigError, shown
from megatron_tf.telemetry.text import bullets

MODEL_TYPE = "tokenformer"
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
_OPTIONAL = {"sparse"}  # left out where they are null
_AS_WRITTEN = "Give the one that to-hf or save_pretrained wrote."


def huggingface_config(model: Model, scales: Mapping[str, float], eod_id: int | None) -> dict[str, Any]:
    """config.json as transformers reads it. `eod_id`: the token that ends a document, when the tokenizer is known."""
    classes = {
        "AutoConfig": (CONFIGURATION_CODE, "TokenFormerConfig"),
        "AutoModel": (MODELING_CODE, "TokenFormerModel"),  # vLLM builds from it
        "AutoModelForCausalLM": (MODELING_CODE, "TokenFormerForCausalLM"),
    }
    values = model.model_dump(exclude_none=True)
    if (sections := architecture_of(model).sparse_sections(model)) is not None:
        values["sparse"] = sections  # losses of the training are nothing that an export has
    return {
        "architectures": ["TokenFormerForCausalLM"],
        "auto_map": {kind: f"{code.removesuffix('.py')}.{name}" for kind, (code, name) in classes.items()},
        "model_type": MODEL_TYPE,
        "dtype": "float32",
        "tie_word_embeddings": True,
        **special_tokens(eod_id),
        **{key: values[field] for field, key in _KEYS.items() if field in values},
        "scales": [
            {_short(projection): scales[f"blocks.{layer}.{projection}"] for projection in PROJECTIONS}
            for layer in range(model.num_layers)
        ],
    }


def special_tokens(eod_id: int | None) -> dict[str, int]:
    """One token begins and ends documents, and pads: nothing attends to padding."""
    return {} if eod_id is None else {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id}


def model_from_config(config: Any) -> tuple[Model, dict[str, float]]:
    """The model and τ of every projection that a config.json says; keys of no interest here are passed over.

    CheckpointError, with all problems, when it is not of a TokenFormer, or incomplete.
    """
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"is of a model of type {shown(kind)}, expected {MODEL_TYPE!r}. Give a TokenFormer's")
    needed = [key for field, key in _KEYS.items() if field not in _OPTIONAL]
    problems = [f"{key}: missing. {_AS_WRITTEN}" for key in (*needed, "scales") if key not in config]
    if problems:
        raise CheckpointError(_listed(problems))
    if config.get("tie_word_embeddings", True) is not True:
        raise CheckpointError(
            "has an output head of its own, and here the head is the embedding. Give a model with tie_word_embeddings "
            "true"
        )
    try:
        model = read_model({field: config[key] for field, key in _KEYS.items() if key in config})
    except ConfigError as error:
        raise CheckpointError(_listed([_under_its_keys(problem) for problem in error.problems])) from None
    return model, _scales(config["scales"], model)


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


def _under_its_keys(problem: str) -> str:
    """A sentence about our model section, as one about config.json."""
    return re.sub(r"\bmodel\.(\w+)", lambda key: _KEYS.get(key[1], key[1]), problem)


def _short(projection: str) -> str:
    """The last part of a projection's Hugging Face name, by which the remote code knows it within its layer."""
    return PROJECTIONS[projection].huggingface.rpartition(".")[2]


def _listed(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else bullets(problems)
