"""The block of a TokenFormer: five Pattentions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron_tf.architectures.tokenformer.section import Bank, TokenFormerModel, as_tokenformer, bank_of
from megatron_tf.config.schema import Model
from megatron_tf.model.context import Reports
from megatron_tf.model.layers import Attention, Block, Pattention, TensorParallel, partial_outputs
from megatron_tf.model.sparse_pattention import SparsePattention
from megatron_tf.parallel.collectives import gather_from, scatter_together


class PattentionAttention(Attention):
    """Query, key, value and output projections are Pattentions."""

    def __init__(self, model: TokenFormerModel, prefix: str, scales: Mapping[str, float], tensor: TensorParallel):
        super().__init__(model, tensor)
        tokens = model.parameter_tokens
        self.query = _projection(model, f"{prefix}.query", tokens.qkv, scales, tensor)
        self.key = _projection(model, f"{prefix}.key", tokens.qkv, scales, tensor)
        self.value = _projection(model, f"{prefix}.value", tokens.qkv, scales, tensor)
        self.proj = _projection(model, f"{prefix}.proj", tokens.proj, scales, tensor)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        partial = partial_outputs([self.query, self.key, self.value], x)
        # a rank needs only its own heads, so the sum over the ranks is a reduce-scatter, never an all-reduce
        own = scatter_together(partial, self.tensor.group, -1)
        query, key, value = (heads.unflatten(-1, (-1, self.head_dim)) for heads in own)
        return query, key, value

    def join(self, heads: Tensor) -> Tensor:
        return self.proj.partial(gather_from(heads, self.tensor.group, -1))


class SparseBlock(Block):
    """Its feed-forward projection chooses among parameter tokens, and reports how evenly."""

    ffn: SparsePattention

    def feed_forward(self, x: Tensor, losses: Reports, metrics: Reports) -> Tensor:
        return self.ffn.partial(x, losses, metrics)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles attention alone: products with candidates have the sizes that the choice gives them."""
        self.attention.compile(*args, **kwargs)


def tokenformer_block(model: Model, layer: int, scales: Mapping[str, float], tensor: TensorParallel) -> Block:
    """A `BlockFactory`."""
    model = as_tokenformer(model)
    prefix = f"blocks.{layer}"
    attention = PattentionAttention(model, f"{prefix}.attention", scales, tensor)
    if (bank := bank_of(model, "ffn")) is not None:
        return SparseBlock(attention, _sparse(model, f"{prefix}.ffn", bank, scales, tensor), tensor, model.norm_eps)
    ffn = _projection(model, f"{prefix}.ffn", model.parameter_tokens.ffn, scales, tensor)
    return Block(attention, ffn, tensor, model.norm_eps)


def _projection(
    model: TokenFormerModel, name: str, tokens: int, scales: Mapping[str, float], tensor: TensorParallel
) -> Pattention:
    d = model.hidden_size
    return Pattention(tokens, d, d, scale=scales[name], activation=model.activation, group=tensor.group)


def _sparse(
    model: TokenFormerModel, name: str, bank: Bank, scales: Mapping[str, float], tensor: TensorParallel
) -> SparsePattention:
    d = model.hidden_size
    return SparsePattention(
        model.parameter_tokens.ffn, d, d,
        group_size=bank.group_size, candidates=bank.candidates, dense=bank.dense,
        scale=scales[name], activation=model.activation, group=tensor.group,
        z_loss=model.sparse.z_loss if model.sparse else 0.0,
    )  # fmt: skip
