"""The official TokenFormer's weights: their names and shapes, and the model that they belong to.

Names are read through the parameter table. The official code computes τ from the number of tokens, so its files hold
none: τ of a model in this format is that of a fresh model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_tf.architectures.tokenformer.parameters import PROJECTIONS
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.load import read_model
from megatron_tf.config.sections.model import Model
from megatron_tf.convert.tensors import Shape, differing_tensors
from megatron_tf.errors import CheckpointError, shown
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.state.parameters import parameter_table
from megatron_tf.telemetry.text import bullets

_EMBEDDING = "sequential.0.word_embeddings.weight"
_BLOCK = re.compile(r"sequential\.(\d{1,6})\.(?:attention|mlp)\.")
_FINAL_NORM = re.compile(r"sequential\.(\d{1,6})\.norm\.")
_FIRST_BLOCK = 2  # position of the first block in the official sequence; one step lies between the last and the norm
_LISTED = 6  # problems listed in a message
_OTHER_VOCABULARY = " rows: another tokenizer, or another padding of its vocabulary"


def _model(layers: int, width: int, heads: int, positions: int, tokens: tuple[int, int, int], vocab: int) -> Model:
    return Model.model_validate(
        {
            "num_layers": layers,
            "hidden_size": width,
            "num_attention_heads": heads,
            "seq_length": positions,
            "vocab_size": vocab,
            "parameter_tokens": dict(zip(("qkv", "proj", "ffn"), tokens)),
        }
    )


# The weights do not tell the number of heads and the sequence length. For these models they are known.
PUBLISHED = {
    "TokenFormer-150M, The Pile": _model(12, 768, 12, 2048, (768, 768, 3072), 50304),
    "TokenFormer-450M, The Pile": _model(24, 1024, 16, 2048, (1024, 1024, 4096), 50304),
    "TokenFormer-900M, The Pile": _model(32, 1280, 16, 2048, (1280, 1280, 5120), 50304),
    "TokenFormer-1.5B, The Pile": _model(40, 1536, 16, 2048, (1536, 1536, 6144), 50304),
    "TokenFormer-354M, OpenWebText2": _model(24, 1024, 16, 1024, (768, 768, 3072), 50304),
    "TokenFormer-757M, OpenWebText2": _model(24, 1024, 16, 1024, (1792, 1792, 7168), 50304),
}


@torch.no_grad()
def load_official_state_dict(state_dict: Mapping[str, Tensor], model: TokenFormer) -> None:
    """Copies weights under the official names into `model`, after every name and shape was checked.

    CheckpointError lists the tensors that are missing, unknown, or of another shape; nothing is copied then.
    """
    check_official({name: tuple(tensor.shape) for name, tensor in state_dict.items()}, model.config)
    parameters = dict(model.named_parameters())
    for name, spec in parameter_table(model.config).items():
        parameters[name].copy_(state_dict[spec.official_name])


def check_official(shapes: Mapping[str, Shape], model: Model) -> None:
    """CheckpointError unless tensors of these names and shapes are all weights of `model`, and nothing else."""
    official = {spec.official_name: spec.shape for spec in parameter_table(model).values()}
    # a wrong size would otherwise be reported again for every tensor
    if problems := _differing_sizes(shapes, model) or differing_tensors(shapes, official, "the model wants"):
        raise CheckpointError(
            f"these are not the official weights of this model:{bullets(problems, _LISTED)}"
            + "\nGive the configuration that they were trained with, or the whole file."
        )


def known_model(shapes: Mapping[str, Shape], arguments: Mapping[str, Any]) -> tuple[Model, str]:
    """(The model that weights of these names and shapes belong to, how that is known, as text).

    `arguments`: those that the official trainer has recorded with them; may be empty. CheckpointError when they are not
    official weights, or the number of heads is not known; ConfigError when the model is not valid.
    """
    sizes = dict(stored_sizes(shapes))
    for name, model in PUBLISHED.items():
        if dict(_sizes_of(model)) == sizes and not recorded_problems(model, arguments):
            return model, f"{name}, known by its shapes"
    tokens = {key.removeprefix("parameter_tokens."): sizes.pop(key) for key in list(sizes) if "." in key}
    recorded = {
        "num_attention_heads": arguments.get("num_attention_heads"),
        "seq_length": arguments.get("max_position_embeddings"),
    }
    if not all(type(value) is int and 0 < value < 2**31 for value in recorded.values()):
        found = ", ".join(f"{key} {value:,}" for key, value in {**sizes, **tokens}.items())
        raise CheckpointError(
            f"this is none of the published models ({found}), and weights do not show num_attention_heads, seq_length "
            "and activation: give --config with a configuration that does"
        )
    model = read_model({**sizes, **recorded, "parameter_tokens": tokens})
    return model, "heads and sequence length as its trainer recorded, activation as in all official configurations"


def recorded_problems(model: Model, arguments: Mapping[str, Any]) -> list[str]:
    """Differences of `model` from the arguments that the official trainer has recorded with the weights."""
    recorded = {key: arguments.get(key) for key in ("num_layers", "hidden_size", "num_attention_heads")}
    recorded["vocab_size"] = arguments.get("padded_vocab_size")
    return [
        f"model.{key} is {getattr(model, key):,}, and was {shown(value)} in the training of these weights"
        for key, value in recorded.items()
        if type(value) is int and value != getattr(model, key)
    ]


def stored_sizes(shapes: Mapping[str, Shape]) -> Iterator[tuple[str, int]]:
    """(key of the configuration's model section, value) as far as shapes tell. CheckpointError when they tell
    nothing."""
    blocks = [int(match[1]) for name in shapes if (match := _BLOCK.match(name))]
    norms = [int(match[1]) for name in shapes if (match := _FINAL_NORM.match(name))]
    embedding = shapes.get(_EMBEDDING, ())
    if not blocks or len(embedding) != 2:
        names = ", ".join(list(shapes)[:3]) or "nothing"
        raise CheckpointError(
            f"these are not official TokenFormer weights, which hold {_EMBEDDING} and blocks of parameter tokens; "
            f"here are {names}{', ...' if len(shapes) > 3 else ''}"
        )
    yield "num_layers", (max(norms) - 1 if norms else max(blocks) + 1) - _FIRST_BLOCK
    yield "hidden_size", embedding[1]
    yield "vocab_size", embedding[0]
    for kind, official in {p.tokens: p.official for p in PROJECTIONS.values()}.items():
        shape = shapes.get(f"sequential.{_FIRST_BLOCK}.{official}.key_param_tokens", ())
        if len(shape) != 2:
            raise CheckpointError(
                f"missing tensor sequential.{_FIRST_BLOCK}.{official}.key_param_tokens, which says how many "
                f"{kind} tokens there are: the file is not whole"
            )
        yield f"parameter_tokens.{kind}", shape[0]


def _sizes_of(model: Model) -> Iterator[tuple[str, int]]:
    for key in ("num_layers", "hidden_size", "vocab_size"):
        yield key, getattr(model, key)
    for kind, count in architecture_of(model).token_counts(model).items():
        yield f"parameter_tokens.{kind}", count


def _differing_sizes(shapes: Mapping[str, Shape], model: Model) -> list[str]:
    """Problems with whole sizes, by key of the configuration, in which the weights and `model` differ."""
    try:
        sizes = dict(stored_sizes(shapes))
    except CheckpointError:
        return []
    return [
        f"model.{key} is {mine:,}, the weights have {sizes[key]:,}{_OTHER_VOCABULARY if key == 'vocab_size' else ''}"
        for key, mine in _sizes_of(model)
        if sizes[key] != mine
    ]
