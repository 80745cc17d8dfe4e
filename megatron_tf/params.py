"""The parameter table: every fact about every parameter, declared once.

Model, optimizer, checkpoint, growth, conversion and estimates read it. A *logical* tensor is the
unsharded one; every sharded tensor is split along dim 0, so any shard of it, and any ZeRO partition of
that shard, is one contiguous range of its flattened elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, get_args

from megatron_tf.checks import check_choice, check_whole_number
from megatron_tf.config.schema import Activation, Model


class Projection(NamedTuple):
    """The names of one projection of a block: of its token count in the config, of its module in other formats."""

    tokens: str
    official: str
    huggingface: str


PROJECTIONS = {
    "attention.query": Projection("qkv", "attention.query", "self_attn.q_proj"),
    "attention.key": Projection("qkv", "attention.key", "self_attn.k_proj"),
    "attention.value": Projection("qkv", "attention.value", "self_attn.v_proj"),
    "attention.proj": Projection("proj", "attention.proj", "self_attn.o_proj"),
    "ffn": Projection("ffn", "mlp", "mlp"),
}
EMBEDDING = "embedding.weight"
INITIAL_STD = 0.02  # of key tokens, of a transformer's qkv and up, and of the embedding


@dataclass(frozen=True)
class ParameterSpec:
    """One logical parameter.

    `shape`: logical shape.  `sharded`: split along dim 0 over the tensor group, else replicated.
    `growable`: dim 0 counts parameter tokens.  `decayed`: weight decay applies.
    `std`, `mean`: of the normal initialiser; std 0 is a constant.
    `transposed`: its Hugging Face tensor is [columns, rows], for it is the weight of a linear layer from the tokens.
    """

    name: str
    shape: tuple[int, ...]
    sharded: bool
    growable: bool
    decayed: bool
    std: float
    mean: float
    official_name: str  # these two are "" for a transformer's, which neither format has
    huggingface_name: str
    transposed: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Elements of one row (1 for a vector)."""
        return math.prod(self.shape[1:])


def projection_tokens(model: Model) -> dict[str, int]:
    """Number of parameter tokens of every projection: {"blocks.0.attention.query": n, ...}; a transformer has none."""
    if model.architecture == "transformer":
        return {}
    counts = model.token_counts
    return {
        f"blocks.{layer}.{name}": getattr(counts, projection.tokens)
        for layer in range(model.num_layers)
        for name, projection in PROJECTIONS.items()
    }


def check_activation(name: str) -> None:
    """ArgumentError unless `name` is an activation."""
    check_choice("activation", name, get_args(Activation))


def default_scale(num_tokens: int, activation: Activation) -> float:
    """τ of a Pattention trained from scratch: √n for the L2 forms, n for softmax."""
    check_activation(activation)
    check_whole_number("num_tokens", num_tokens, 1)
    return float(num_tokens) if activation == "softmax" else math.sqrt(num_tokens)


def initial_scales(model: Model) -> dict[str, float]:
    """τ of every projection of a fresh model. A trained model's τ comes from its checkpoint instead."""
    return {name: default_scale(n, model.activation) for name, n in projection_tokens(model).items()}


def parameter_table(model: Model) -> dict[str, ParameterSpec]:
    """All parameters by logical name, in model order (embedding, blocks, final norm)."""
    d = model.hidden_size
    specs = [
        ParameterSpec(EMBEDDING, (model.vocab_size, d), sharded=True, growable=False, decayed=True,
                      std=INITIAL_STD, mean=0.0, official_name="sequential.0.word_embeddings.weight",
                      huggingface_name="model.embed_tokens.weight")
    ]  # fmt: skip
    block = _token_specs if model.architecture == "tokenformer" else _matrix_specs
    for layer in range(model.num_layers):
        specs += block(model, layer)
    for name, mean in (("weight", 1.0), ("bias", 0.0)):
        specs.append(
            ParameterSpec(
                f"final_norm.{name}", (d,), sharded=False, growable=False, decayed=False, std=0.0, mean=mean,
                official_name=f"sequential.{model.num_layers + 3}.norm.{name}",
                huggingface_name=f"model.norm.{name}",
            )
        )  # fmt: skip
    return {spec.name: spec for spec in specs}


def _output_std(model: Model) -> float:
    """Of what a block adds to the hidden states: small enough that the sum over all blocks is, too (GPT-NeoX)."""
    return 2 / (model.num_layers * math.sqrt(model.hidden_size))


def _token_specs(model: Model, layer: int) -> Iterator[ParameterSpec]:
    """A tokenformer's block: key and value tokens [n, d] of every projection."""
    for name, projection in PROJECTIONS.items():
        tokens = getattr(model.token_counts, projection.tokens)
        for kind, std in (("key", INITIAL_STD), ("value", _output_std(model))):
            yield ParameterSpec(
                f"blocks.{layer}.{name}.{kind}_tokens", (tokens, model.hidden_size),
                sharded=True, growable=True, decayed=True, std=std, mean=0.0,
                official_name=f"sequential.{layer + 2}.{projection.official}.{kind}_param_tokens",
                huggingface_name=f"model.layers.{layer}.{projection.huggingface}.{kind}s.weight",
                transposed=kind == "value",
            )  # fmt: skip


def _matrix_specs(model: Model, layer: int) -> Iterator[ParameterSpec]:
    """A transformer's block. Dim 0 of each matrix is the axis that is split over the tensor group.

    | matrix | shape | dim 0 |
    |---|---|---|
    | attention.qkv | [3·d, d] | outputs, by heads: query, key and value of the first head, of the second, ... |
    | attention.proj | [d, d] | inputs, by heads |
    | ffn.up | [f, d] | outputs |
    | ffn.down | [f, d] | inputs |
    """
    d, f = model.hidden_size, model.mlp_width
    for matrix, rows, std in (
        ("attention.qkv", 3 * d, INITIAL_STD),
        ("attention.proj", d, _output_std(model)),
        ("ffn.up", f, INITIAL_STD),
        ("ffn.down", f, _output_std(model)),
    ):
        yield ParameterSpec(
            f"blocks.{layer}.{matrix}.weight", (rows, d),
            sharded=True, growable=False, decayed=True, std=std, mean=0.0, official_name="", huggingface_name="",
        )  # fmt: skip


def shard_range(rows: int, num_shards: int, shard: int) -> tuple[int, int]:
    """Rows [start, stop) of dim 0 that `shard` of `num_shards` holds.

    Shards differ by at most one row when `rows` does not divide; nothing is padded, so no row exists that
    would have to be kept out of τ, of weight decay, or of a checkpoint.
    """
    return rows * shard // num_shards, rows * (shard + 1) // num_shards
