"""Between the model section of a configuration and the config.json of an export; τ of every projection goes along."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_tf.config.schema import Model
from megatron_tf.errors import CheckpointError
from megatron_tf.params import PROJECTIONS

MODEL_TYPE = "tokenformer"
CONFIGURATION_CODE = "configuration_tokenformer.py"
MODELING_CODE = "modeling_tokenformer.py"
# field of our model section -> key of config.json
_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "seq_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "parameter_tokens": "parameter_tokens",
    "activation": "activation",
    "rotary_fraction": "rotary_fraction",
    "rotary_base": "rotary_base",
    "norm_eps": "layer_norm_eps",
}


def huggingface_config(model: Model, scales: Mapping[str, float], eod_id: int | None) -> dict[str, Any]:
    """config.json as transformers reads it. `eod_id`: the token that ends a document, when the tokenizer is known."""
    classes = {
        "AutoConfig": (CONFIGURATION_CODE, "TokenFormerConfig"),
        "AutoModel": (MODELING_CODE, "TokenFormerModel"),  # vLLM builds from it
        "AutoModelForCausalLM": (MODELING_CODE, "TokenFormerForCausalLM"),
    }
    values = model.model_dump()
    return {
        "architectures": ["TokenFormerForCausalLM"],
        "auto_map": {kind: f"{code.removesuffix('.py')}.{name}" for kind, (code, name) in classes.items()},
        "model_type": MODEL_TYPE,
        "dtype": "float32",
        "tie_word_embeddings": True,
        **special_tokens(eod_id),
        **{key: values[field] for field, key in _KEYS.items()},
        "scales": [
            {_short(projection): scales[f"blocks.{layer}.{projection}"] for projection in PROJECTIONS}
            for layer in range(model.num_layers)
        ],
    }


def special_tokens(eod_id: int | None) -> dict[str, int]:
    """One token begins and ends documents, and pads: nothing attends to padding."""
    return {} if eod_id is None else {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": eod_id}


def stored_model(config: Any) -> tuple[Model, dict[str, float]]:
    """The model and τ of every projection that a config.json says; keys of no interest here are passed over.

    CheckpointError, with all problems, when it is not of a TokenFormer, or incomplete.
    """
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        kind = config.get("model_type") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"is of a model of type {kind!r}, expected {MODEL_TYPE!r}")
    problems = [f"no {key}" for key in (*_KEYS.values(), "scales") if key not in config]
    if problems:
        raise CheckpointError(_listed(problems))
    if config.get("tie_word_embeddings", True) is not True:
        raise CheckpointError("has an output head of its own, and here the head is the embedding")
    try:
        model = Model.model_validate({field: config[key] for field, key in _KEYS.items()})
    except ValidationError as error:
        named = [(str(e["loc"][0]), e) for e in error.errors()]
        raise CheckpointError(_listed([f"{_KEYS.get(field, field)}: {e['msg']}" for field, e in named])) from error
    return model, _scales(config["scales"], model)


def _scales(stored: Any, model: Model) -> dict[str, float]:
    names = {_short(projection): projection for projection in PROJECTIONS}
    layers = stored if isinstance(stored, list) else []
    if len(layers) != model.num_layers:
        raise CheckpointError(f"scales are of {len(layers)} layers, the model has {model.num_layers}")
    scales = {}
    for number, layer in enumerate(layers):
        if not isinstance(layer, dict) or set(layer) != set(names):
            raise CheckpointError(f"scales of layer {number} must be those of {', '.join(names)}")
        for name, scale in layer.items():
            if type(scale) not in (int, float) or not 0 < scale < float("inf"):
                raise CheckpointError(f"the scale of {name} in layer {number} is {scale!r}, expected a number above 0")
            scales[f"blocks.{number}.{names[name]}"] = float(scale)
    return scales


def _short(projection: str) -> str:
    """The last part of a projection's Hugging Face name, by which the remote code knows it within its layer."""
    return PROJECTIONS[projection].huggingface.rpartition(".")[2]


def _listed(problems: list[str]) -> str:
    return problems[0] if len(problems) == 1 else "".join(f"\n  - {problem}" for problem in problems)
