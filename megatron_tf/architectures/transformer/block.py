"""The block of a Transformer: matrices, and a GELU MLP."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_tf.architectures.spec import shard_range
from megatron_tf.architectures.transformer.parameters import qkv_rows
from megatron_tf.architectures.transformer.section import TransformerModel, as_transformer
from megatron_tf.config.sections.model import Model
from megatron_tf.model.later import Later
from megatron_tf.model.layers import Attention, Block, TensorParallel
from megatron_tf.model.linear import linear
from megatron_tf.parallel.groups import Group


class SplitMatrix(nn.Module):
    """A matrix of `rows` logical rows, which are split over the group. They are its outputs or its inputs. No bias."""

    def __init__(self, rows: int, width: int, group: Group):
        super().__init__()
        start, stop = shard_range(rows, group.size, group.rank)
        self.weight = nn.Parameter(torch.empty(stop - start, width))
        # where a backward pass defers the gradient of the weight to; None: it computes it
        self.later: Later | None = None

    def split(self, x: Tensor) -> Tensor:
        """Rows as outputs: x [..., width], whole -> [..., rows/T]."""
        return linear(x, self.weight, self.later)

    def partial(self, x: Tensor) -> Tensor:
        """Rows as inputs: x [..., rows/T] -> [..., width], still to be summed over the group."""
        return linear(x, self.weight, self.later, transposed=True)


class LinearAttention(Attention):
    """Query, key, value and output projections are matrices. The first three are one matrix.

    With h query heads and g heads of keys and values, each group of h/g query heads shares one key and one value.
    """

    def __init__(self, model: TransformerModel, tensor: TensorParallel):
        super().__init__(model, tensor)
        self.queries_per_key = model.num_attention_heads // model.num_key_value_heads
        self.qkv = SplitMatrix(qkv_rows(model), model.hidden_size, tensor.group)
        self.proj = SplitMatrix(model.hidden_size, model.hidden_size, tensor.group)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = self.qkv.split(x).unflatten(-1, (-1, self.queries_per_key + 2, self.head_dim))
        query, key, value = groups.split((self.queries_per_key, 1, 1), -2)
        return query.flatten(-3, -2), key.squeeze(-2), value.squeeze(-2)

    def join(self, heads: Tensor) -> Tensor:
        return self.proj.partial(heads)


class Mlp(nn.Module):
    """GELU(X upᵀ) down."""

    def __init__(self, model: TransformerModel, group: Group):
        super().__init__()
        self.up = SplitMatrix(model.ffn_hidden_size, model.hidden_size, group)
        self.down = SplitMatrix(model.ffn_hidden_size, model.hidden_size, group)

    def partial(self, x: Tensor) -> Tensor:
        """x [..., d], whole -> [..., d], still to be summed over the group."""
        return self.down.partial(F.gelu(self.up.split(x)))


def transformer_block(model: Model, layer: int, scales: Mapping[str, float], tensor: TensorParallel) -> Block:
    """The `BlockFactory` of the Transformer. `layer` and `scales` are not used: all blocks are equal, without a τ."""
    model = as_transformer(model)
    return Block(LinearAttention(model, tensor), Mlp(model, tensor.group), tensor, model.norm_eps)
