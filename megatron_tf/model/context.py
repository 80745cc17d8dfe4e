"""What a block is given besides hidden states, and what it can give back: auxiliary losses and metrics.

An auxiliary loss acts on the gradient where it arises. Its block passes the hidden states on through `attach`: the
identity, whose backward pass gives the loss the gradient that it would have as a term of the objective. So no loss has
to travel to the last pipeline stage, and every layout computes the gradient that one process computes from

    objective = loss + Σ over blocks of the mean over micro batches of the auxiliary loss.

Under tensor parallelism a loss or metric is *partial*: this rank's part of a sum over the tensor ranks. It is made from
what the rank computes between `TensorParallel.enter` and `leave`, where gradients are summed over the ranks. What every
rank computes alike there is divided by their number.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Function

from megatron_tf.model.attention import Documents, find_documents

if TYPE_CHECKING:
    from megatron_tf.model.layers import Block

Reports = dict[str, Tensor]  # name -> scalar


class BlockContext:
    """Of one micro batch, for all blocks of a stage.

    `documents`: None is one document a sample.
    `loss_weight`: what an auxiliary loss counts in the gradient. None: losses are only collected, with their graph, and
        the caller adds them to the objective.
    `branches`: what each sample's residual branches are multiplied by, [layers, branches, b] as `drop_path` gives it;
        None: by 1.
    `losses`, `metrics`: sums over the blocks so far, by name.
    """

    # Not a dataclass: torch's `fully_shard` copies those among a module's arguments, and what blocks add would be lost.
    def __init__(
        self,
        documents: Documents | None = None,
        loss_weight: Tensor | float | None = None,
        branches: Tensor | None = None,
    ):
        self.documents = documents
        self.loss_weight = loss_weight
        self.branches = branches
        self.losses: Reports = {}
        self.metrics: Reports = {}

    def add(self, losses: Reports, metrics: Reports) -> None:
        """What one block has given back."""
        for sums, given in ((self.losses, losses), (self.metrics, metrics)):
            for name, value in given.items():
                own = value if sums is self.losses and self.loss_weight is None else value.detach()
                sums[name] = sums[name] + own if name in sums else own


def run_blocks(blocks: Iterable[Block], hidden: Tensor, starts: Tensor | None, context: BlockContext) -> Tensor:
    """Hidden states between layers -> what the last block gives.

    `starts`: see `attention.document_starts`; None is one document a sample.
    """
    for block in blocks:
        if starts is not None and context.documents is None:
            context.documents = find_documents(starts, hidden.dtype, block.attention.head_dim)
        hidden = block(hidden, context)
    return hidden


class _Attach(Function):
    @staticmethod
    def forward(ctx, hidden, loss, weight):
        ctx.weight, ctx.loss = weight, loss.detach()
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones_like(ctx.loss) * ctx.weight, None


def attach(hidden: Tensor, loss: Tensor, weight: Tensor | float) -> Tensor:
    """`hidden`; in the backward pass `loss`, a scalar, gets `weight` as its gradient."""
    return _Attach.apply(hidden, loss, weight)
