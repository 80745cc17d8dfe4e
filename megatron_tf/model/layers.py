"""The layers that architectures share, for any tensor-parallel group.

Parameter names are the logical names.

| tensor | local shape | under sequence parallelism |
|---|---|---|
| hidden between layers | [s, b, d] | [s/T, b, d] |
| query, key, value | [s, b, heads/T, head_dim] | the same |
| attention output | [s, b, d/T] | the same |
| activations of a Transformer's MLP | [s, b, f/T] | the same |

With C context ranks, s becomes s/C everywhere here: rank r has the r-th part of each sample. For attention itself the
ranks exchange positions for heads: [s, b, heads/(T·C), head_dim] with all positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import task_of
from megatron_tf.model.attention import Documents, causal_attention, full_attention
from megatron_tf.model.context import BlockContext, Reports, attach
from megatron_tf.parallel.collectives import copy_to, exchange, gather_from, reduce_from, scatter_to
from megatron_tf.parallel.groups import SINGLE, Group
from megatron_tf.parallel.meanwhile import Meanwhile

if TYPE_CHECKING:
    from megatron_tf.tasks.layers import TaskLayers


class TensorParallel:
    """How hidden states enter and leave sharded work.

    `group`: the tensor ranks.  `sequence`: between layers, hidden states are split over the sequence (sequence
    parallelism); otherwise they are replicated.  `context`: the ranks that share the positions of the same samples.
    """

    def __init__(self, group: Group = SINGLE, sequence: bool = False, context: Group = SINGLE):
        self.group = group
        self.sequence = sequence and group.size > 1
        self.context = context

    @property
    def length_multiple(self) -> int:
        """The number of ranks that share the positions of a sample. Lengths must be a multiple of it."""
        return self.context.size * (self.group.size if self.sequence else 1)

    def own_positions(self, t: Tensor) -> Tensor:
        """This context rank's part [b, s/C] of ids or labels t [b, s]."""
        return t if self.context.size == 1 else t.chunk(self.context.size, 1)[self.context.rank]

    def enter(self, hidden: Tensor, meanwhile: Meanwhile | None = None) -> Tensor:
        """Hidden between layers -> [s, b, d], whole on every rank. The backward pass sums over the ranks.

        `meanwhile`: what it computes while the sum is on its way.
        """
        if self.sequence:
            return gather_from(hidden, self.group, 0, meanwhile)
        return copy_to(hidden, self.group, meanwhile)

    def leave(self, partial: Tensor) -> Tensor:
        """A partial sum [s, b, d] of each rank -> hidden between layers."""
        return scatter_to(partial, self.group, 0) if self.sequence else reduce_from(partial, self.group)

    def replicated(self, weight: Tensor) -> Tensor:
        """`weight`, a replicated one that acts on hidden between layers, with the right gradient.

        Under sequence parallelism each rank sees only its own positions, so the weight's gradient has to be summed over
        the ranks; otherwise it is whole already.
        """
        return copy_to(weight, self.group) if self.sequence else weight


class Attention(nn.Module, ABC):
    """Attention over this rank's heads, causal if the model's task is. The projections before and after it are the
    architecture's: `split` and `join`."""

    def __init__(self, model: Model, tensor: TensorParallel):
        super().__init__()
        self.tensor = tensor
        self.head_dim = model.hidden_size // model.num_attention_heads
        self.rotary_channels = int(self.head_dim * model.rotary_fraction)
        self.rotary_base = model.rotary_base
        # generation replaces it by attention over its cache
        self.attend: Callable[..., Tensor] = causal_attention if task_of(model).causal else full_attention

    @abstractmethod
    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [s, b, d], whole -> query, key and value of this rank's heads, [s, b, heads/T, head_dim] each."""

    @abstractmethod
    def join(self, heads: Tensor) -> Tensor:
        """Output of this rank's heads [s, b, d/T] -> [s, b, d], still to be summed over the tensor group."""

    def forward(self, hidden: Tensor, documents: Documents | None = None) -> Tensor:
        heads = self.split(self.tensor.enter(hidden))
        return self.tensor.leave(self.join(self.attended(heads, documents)))

    def attended(self, heads: tuple[Tensor, Tensor, Tensor], documents: Documents | None) -> Tensor:
        """Query, key and value of this rank's heads -> their output [s, b, d/T].

        Context ranks exchange positions for heads, so that each computes some heads over all positions. That divides
        causal attention evenly, and needs no special treatment of positions and documents.
        """
        context = self.tensor.context
        query, key, value = (exchange(t, context, 2, 0) for t in heads)
        out = self.attend(query, key, value, self.rotary_channels, self.rotary_base, documents)
        return exchange(out, context, 0, 2)


class FeedForward(Protocol):
    """The part of a block after its second norm."""

    def partial(self, x: Tensor) -> Tensor:
        """x [..., d], whole -> [..., d], still to be summed over the tensor group."""
        ...


class Block(nn.Module):
    """Pre-norm block: x += attention(LN(x)); x += ffn(LN(x)). The norms have no weight.

    (In a Transformer a weight would add nothing, because its product with the matrix that follows is again a matrix.)
    """

    def __init__(self, attention: Attention, ffn: FeedForward, tensor: TensorParallel, eps: float):
        """`eps`: of the norms."""
        super().__init__()
        self.attention = attention
        self.ffn = ffn
        self.tensor = tensor
        self.eps = eps
        # the layer's number; `build_block` sets it
        self.layer = 0
        self.recompute = False  # keep only the block's input for the backward pass

    def compile_for(self, device_type: str, dtype: torch.dtype) -> None:
        """torch.compile of what can be compiled, to be computed on such a device in `dtype`."""
        self.compile()

    def forward(self, hidden: Tensor, context: BlockContext | None = None) -> Tensor:
        """Hidden between layers -> the same. `context`: None: each sample is one document, and reports are dropped."""
        documents = None if context is None else context.documents
        branches = None if context is None or context.branches is None else context.branches[self.layer]
        if self.recompute and torch.is_grad_enabled():
            hidden, losses, metrics = checkpoint(self._forward, hidden, documents, branches, use_reentrant=False)
        else:
            hidden, losses, metrics = self._forward(hidden, documents, branches)
        if context is not None and (losses or metrics):
            if context.loss_weight is not None and torch.is_grad_enabled():
                for loss in losses.values():
                    hidden = attach(hidden, loss, context.loss_weight)
            context.add(losses, metrics)
        return hidden

    def _forward(
        self, hidden: Tensor, documents: Documents | None, branches: Tensor | None
    ) -> tuple[Tensor, Reports, Reports]:
        losses: Reports = {}
        metrics: Reports = {}
        attended = self.forward_attention(self._norm(hidden), documents, losses, metrics)
        hidden = hidden + _scaled(attended, branches, 0)
        fed = self.forward_ffn(self._norm(hidden), losses, metrics)
        return hidden + _scaled(fed, branches, 1), losses, metrics

    def forward_attention(
        self, hidden: Tensor, documents: Documents | None, losses: Reports, metrics: Reports
    ) -> Tensor:
        """Normed hidden between layers -> the output of attention, to be added to the hidden states.

        A block with auxiliary losses or metrics overrides this or `feed_forward`, and writes them into `losses` and
        `metrics` as scalars, partial as `model.context` defines. Its architecture's `losses` and `metrics` name them.
        """
        return self.attention(hidden, documents)

    def forward_ffn(self, hidden: Tensor, losses: Reports, metrics: Reports) -> Tensor:
        """Normed hidden between layers -> the output of the feed-forward, to be added to the hidden states."""
        return self.tensor.leave(self.feed_forward(self.tensor.enter(hidden), losses, metrics))

    def feed_forward(self, x: Tensor, losses: Reports, metrics: Reports) -> Tensor:
        """x [..., d], whole -> [..., d], still to be summed over the tensor group."""
        return self.ffn.partial(x)

    def _norm(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, hidden.shape[-1:], eps=self.eps)


def _scaled(branch: Tensor, branches: Tensor | None, number: int) -> Tensor:
    """`branch` [s, b, d] times the factor of each sample in row `number` of `branches` [branches, b]; None: 1."""
    return branch if branches is None else branch * branches[number].to(branch.dtype)[:, None]


class BlockFactory(Protocol):
    """The function of an architecture that makes block `layer` for a tensor rank, with uninitialised weights."""

    def __call__(self, model: Model, layer: int, scales: Mapping[str, float], tensor: TensorParallel) -> Block:
        """`scales`: τ by projection name; empty for an architecture without parameter tokens."""
        ...


class FinalNorm(nn.Module):
    """LayerNorm with weight and bias [d], replicated over the tensor group."""

    def __init__(self, model: Model, tensor: TensorParallel):
        super().__init__()
        self.tensor = tensor
        self.weight = nn.Parameter(torch.ones(model.hidden_size))
        self.bias = nn.Parameter(torch.zeros(model.hidden_size))
        self.eps = model.norm_eps

    def forward(self, hidden: Tensor) -> Tensor:
        weight, bias = self.tensor.replicated(self.weight), self.tensor.replicated(self.bias)
        return F.layer_norm(hidden, hidden.shape[-1:], weight, bias, self.eps)


def build_block(model: Model, layer: int, scales: Mapping[str, float], tensor: TensorParallel) -> Block:
    """Block `layer` of the model's architecture, with uninitialised weights. `scales`: τ by projection."""
    factory: BlockFactory = resolve_name(architecture_of(model).block)
    block = factory(model, layer, scales, tensor)
    block.layer = layer
    return block


def task_layers(model: Model) -> TaskLayers:
    """The layers, loss and metrics of the model's task."""
    return resolve_name(task_of(model).layers)
