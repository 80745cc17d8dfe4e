"""The parameters of a TokenFormer's block: key and value tokens [n, d] of every projection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_tf.architectures.spec import INITIAL_STD, ParameterSpec, output_std
from megatron_tf.architectures.tokenformer.section import Bank, TokenFormerModel, bank_of


class ProjectionNames(NamedTuple):
    """Other names of one projection of a block: its token count in the configuration, its module in foreign formats."""

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
OUTPUTS = ("attention.proj", "ffn")  # projections whose output is added to the hidden states


def block_parameters(model: TokenFormerModel, layer: int) -> Iterator[ParameterSpec]:
    """The parameters of block `layer`, in the order of PROJECTIONS."""
    for name, projection in PROJECTIONS.items():
        tokens = getattr(model.parameter_tokens, projection.tokens)
        if (bank := bank_of(model, projection.tokens)) is not None:
            yield from _bank_parameters(model, layer, name, bank, tokens)
            tokens = bank.dense
        if tokens == 0:
            continue
        for kind, std in (("key", INITIAL_STD), ("value", output_std(model))):
            yield ParameterSpec(
                f"blocks.{layer}.{name}.{kind}_tokens",
                (tokens, model.hidden_size),
                sharded=True,
                growable=True,
                decayed=True,
                std=std,
                mean=0.0,
                output=kind == "value" and name in OUTPUTS,
                official_name=f"sequential.{layer + 2}.{projection.official}.{kind}_param_tokens",
                huggingface_name=f"model.layers.{layer}.{projection.huggingface}.{kind}s.weight",
                transposed=kind == "value",
            )


def _bank_parameters(
    model: TokenFormerModel, layer: int, name: str, bank: Bank, tokens: int
) -> Iterator[ParameterSpec]:
    """The parameters of a projection's bank. Rows are ordered by slot, candidate and token, so that whole slots are one
    contiguous range."""
    prefix = f"blocks.{layer}.{name}.bank"
    huggingface = f"model.layers.{layer}.{PROJECTIONS[name].huggingface}.bank"
    groups = bank.groups(tokens)
    for kind, std in (("key", INITIAL_STD), ("value", output_std(model))):
        yield ParameterSpec(
            f"{prefix}.{kind}_tokens",
            (groups * bank.group_size, model.hidden_size),
            sharded=True,
            growable=True,
            decayed=True,
            std=std,
            mean=0.0,
            output=kind == "value" and name in OUTPUTS,
            one_in=bank.candidates,
            matrix_rows=bank.group_size,
            huggingface_name=f"{huggingface}.{kind}s",
        )
    for kind, shape, std in (("router", (groups, model.hidden_size), INITIAL_STD), ("balance", (groups,), 0.0)):
        yield ParameterSpec(
            f"{prefix}.{kind}",
            shape,
            sharded=True,
            growable=True,
            decayed=kind == "router",
            std=std,
            mean=0.0,
            huggingface_name=f"{huggingface}.{kind}",
        )


def token_tensors(bank: Bank | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(names of the keys, names of the values) of a projection, see `ProjectionSpec`. A bank's router and balance count
    as values, because they have rows by candidate and are not keys."""
    keys, values = ("key_tokens",), ("value_tokens",)
    if bank is None:
        return keys, values
    own_keys = ("bank.key_tokens",)
    own_values = ("bank.value_tokens", "bank.router", "bank.balance")
    return (own_keys + keys, own_values + values) if bank.dense else (own_keys, own_values)
