"""The block of a TokenFormer: five Pattentions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from megatron_tf.architectures.tokenformer.section import TokenFormerModel, as_tokenformer, bank_of, banks_of
from megatron_tf.config.sections.model import Model
from megatron_tf.model.attention import Documents
from megatron_tf.model.context import Reports
from megatron_tf.model.grouped import has_grouped_products
from megatron_tf.model.layers import Attention, Block, TensorParallel
from megatron_tf.model.projection import Entered, Pattention, entered, gathered, partial_outputs
from megatron_tf.model.sparse_pattention import SparsePattention, sparse_outputs
from megatron_tf.parallel.collectives import gather_from, scatter_together


class PattentionAttention(Attention):
    """Query, key, value and output projections are Pattentions."""

    def __init__(self, model: TokenFormerModel, prefix: str, scales: Mapping[str, float], tensor: TensorParallel):
        super().__init__(model, tensor)
        tokens = model.parameter_tokens
        self.query = _dense(model, f"{prefix}.query", tokens.qkv, scales, tensor)
        self.key = _dense(model, f"{prefix}.key", tokens.qkv, scales, tensor)
        self.value = _dense(model, f"{prefix}.value", tokens.qkv, scales, tensor)
        self.proj = _dense(model, f"{prefix}.proj", tokens.proj, scales, tensor)
        for projection in (self.query, self.key, self.value):
            projection.own_rows = tensor.sequence

    def forward(self, hidden: Tensor, documents: Documents | None = None) -> Tensor:
        heads = _dense_heads(self, [self.query, self.key, self.value], hidden)
        return self.tensor.leave(self.join(self.attended(heads, documents)))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _own_heads(self, partial_outputs([self.query, self.key, self.value], Entered(x)))

    def join(self, heads: Tensor) -> Tensor:
        return _dense_join(self.proj, heads)


class SparseAttention(Attention):
    """At least one of qkv and proj chooses among candidates. Those that do report how evenly they choose."""

    def __init__(self, model: TokenFormerModel, prefix: str, scales: Mapping[str, float], tensor: TensorParallel):
        super().__init__(model, tensor)
        self.query = _projection(model, f"{prefix}.query", "qkv", scales, tensor)
        self.key = _projection(model, f"{prefix}.key", "qkv", scales, tensor)
        self.value = _projection(model, f"{prefix}.value", "qkv", scales, tensor)
        self.proj = _projection(model, f"{prefix}.proj", "proj", scales, tensor)
        for projection in (self.query, self.key, self.value):
            if isinstance(projection, Pattention):
                projection.own_rows = tensor.sequence

    def forward(
        self,
        hidden: Tensor,
        documents: Documents | None = None,
        losses: Reports | None = None,
        metrics: Reports | None = None,
    ) -> Tensor:
        if isinstance(self.query, Pattention):
            heads = _dense_heads(self, cast(list[Pattention], [self.query, self.key, self.value]), hidden)
        else:
            heads = self.split(self.tensor.enter(hidden), losses, metrics)
        return self.tensor.leave(self.join(self.attended(heads, documents), losses, metrics))

    def split(
        self, x: Tensor, losses: Reports | None = None, metrics: Reports | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _own_heads(self, _outputs([self.query, self.key, self.value], x, losses, metrics))

    def join(self, heads: Tensor, losses: Reports | None = None, metrics: Reports | None = None) -> Tensor:
        if isinstance(self.proj, Pattention):
            return _dense_join(self.proj, heads)
        return sparse_outputs([self.proj], gather_from(heads, self.tensor.group, -1), losses, metrics)[0]


class TokenFormerBlock(Block):
    """The feed-forward of the block is one projection."""

    ffn: Pattention | SparsePattention

    def __init__(self, attention: Attention, ffn: Pattention | SparsePattention, tensor: TensorParallel, eps: float):
        super().__init__(attention, ffn, tensor, eps)
        if isinstance(ffn, Pattention):
            ffn.own_rows = tensor.sequence

    def forward_ffn(self, hidden: Tensor, losses: Reports, metrics: Reports) -> Tensor:
        if isinstance(self.ffn, SparsePattention):
            return super().forward_ffn(hidden, losses, metrics)
        (fed,) = partial_outputs([self.ffn], entered([self.ffn], hidden, self.tensor))
        return self.tensor.leave(fed)


class SparseBlock(TokenFormerBlock):
    """Some of its projections choose among candidates and report how evenly they do. `load_max` is their mean."""

    def forward_attention(
        self, hidden: Tensor, documents: Documents | None, losses: Reports, metrics: Reports
    ) -> Tensor:
        if isinstance(self.attention, SparseAttention):
            return self.attention(hidden, documents, losses, metrics)
        return self.attention(hidden, documents)

    def forward_ffn(self, hidden: Tensor, losses: Reports, metrics: Reports) -> Tensor:
        fed = super().forward_ffn(hidden, losses, metrics)
        metrics["load_max"] = metrics["load_max"] / _choosing(self)
        return fed

    def feed_forward(self, x: Tensor, losses: Reports, metrics: Reports) -> Tensor:
        return _outputs([self.ffn], x, losses, metrics)[0]

    def compile_for(self, device_type: str, dtype: torch.dtype) -> None:
        """Where the sizes of products depend on the choices, only attention without candidates is compiled."""
        if has_grouped_products(device_type, dtype):
            self.compile()
        elif not isinstance(self.attention, SparseAttention):
            self.attention.compile()


def _choosing(module: nn.Module) -> int:
    """The number of projections that choose among parameter tokens."""
    return sum(isinstance(part, SparsePattention) for part in module.modules())


def tokenformer_block(model: Model, layer: int, scales: Mapping[str, float], tensor: TensorParallel) -> Block:
    """The `BlockFactory` of the TokenFormer."""
    model = as_tokenformer(model)
    prefix = f"blocks.{layer}"
    banks = banks_of(model)
    kind = SparseAttention if {"qkv", "proj"} & banks.keys() else PattentionAttention
    attention = kind(model, f"{prefix}.attention", scales, tensor)
    ffn = _projection(model, f"{prefix}.ffn", "ffn", scales, tensor)
    return (SparseBlock if banks else TokenFormerBlock)(attention, ffn, tensor, model.norm_eps)


def _dense_heads(
    attention: Attention, projections: Sequence[Pattention], hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's heads of query, key and value, from the hidden states between blocks."""
    return _own_heads(attention, partial_outputs(projections, entered(projections, hidden, attention.tensor)))


def _dense_join(proj: Pattention, heads: Tensor) -> Tensor:
    """This rank's part of the output of attention, from its heads."""
    return partial_outputs([proj], gathered(proj, heads))[0]


def _own_heads(attention: Attention, partial: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Partial query, key and value [s, b, d] -> whole ones of this rank's heads, [s, b, heads/T, head_dim] each."""
    # a rank needs only its own heads, so the sum over the ranks is a reduce-scatter, never an all-reduce
    own = scatter_together(partial, attention.tensor.group, -1)
    query, key, value = (heads.unflatten(-1, (-1, attention.head_dim)) for heads in own)
    return query, key, value


def _outputs(
    projections: Sequence[Pattention | SparsePattention],
    x: Tensor,
    losses: Reports | None,
    metrics: Reports | None,
) -> tuple[Tensor, ...]:
    """The outputs of projections of one kind, which share x; each is still to be summed over the tensor group."""
    if isinstance(projections[0], SparsePattention):
        return sparse_outputs(cast(Sequence[SparsePattention], projections), x, losses, metrics)
    return partial_outputs(cast(Sequence[Pattention], projections), Entered(x))


def _dense(
    model: TokenFormerModel, name: str, tokens: int, scales: Mapping[str, float], tensor: TensorParallel
) -> Pattention:
    d = model.hidden_size
    return Pattention(tokens, d, d, scale=scales[name], activation=model.activation, group=tensor.group)


def _projection(
    model: TokenFormerModel, name: str, kind: str, scales: Mapping[str, float], tensor: TensorParallel
) -> Pattention | SparsePattention:
    d, used, bank = model.hidden_size, getattr(model.parameter_tokens, kind), bank_of(model, kind)
    if bank is None:
        return _dense(model, name, used, scales, tensor)
    return SparsePattention(
        used,
        d,
        d,
        group_size=bank.group_size,
        candidates=bank.candidates,
        dense=bank.dense,
        scale=scales[name],
        activation=model.activation,
        group=tensor.group,
        context=tensor.context,
        z_loss=model.sparse.z_loss if model.sparse else 0.0,
    )
