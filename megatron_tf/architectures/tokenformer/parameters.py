"""The parameters of a TokenFormer's block: key and value tokens [n, d] of every projection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_tf.architectures.spec import INITIAL_STD, ParameterSpec, output_std
from megatron_tf.architectures.tokenformer.section import TokenFormerModel


class ProjectionNames(NamedTuple):
    """The names of one projection of a block: of its token count in the config, of its module in other formats."""

    tokens: str
    official: str
    huggingface: str


PROJECTIONS = {
    "attention.query": ProjectionNames("qkv", "attention.query", "self_attn.q_proj"),
    "attention.key": ProjectionNames("qkv", "attention.key", "self_attn.k_proj"),
    "attention.value": ProjectionNames("qkv", "attention.value", "self_attn.v_proj"),
    "attention.proj": ProjectionNames("proj", "attention.proj", "self_attn.o_proj"),
    "ffn": ProjectionNames("ffn", "mlp", "mlp"),
}


def block_parameters(model: TokenFormerModel, layer: int) -> Iterator[ParameterSpec]:
    for name, projection in PROJECTIONS.items():
        tokens = getattr(model.parameter_tokens, projection.tokens)
        for kind, std in (("key", INITIAL_STD), ("value", output_std(model))):
            yield ParameterSpec(
                f"blocks.{layer}.{name}.{kind}_tokens",
                (tokens, model.hidden_size),
                sharded=True,
                growable=True,
                decayed=True,
                std=std,
                mean=0.0,
                official_name=f"sequential.{layer + 2}.{projection.official}.{kind}_param_tokens",
                huggingface_name=f"model.layers.{layer}.{projection.huggingface}.{kind}s.weight",
                transposed=kind == "value",
            )
