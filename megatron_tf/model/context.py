"""The context of a block: its inputs besides hidden states, and its auxiliary losses and metrics.

An auxiliary loss is differentiated in its own block. The block passes its hidden states through `attach`: the identity,
whose backward pass gives the loss the gradient that it would have as a term of the objective. So no loss is sent to the
last pipeline stage, and every layout computes the gradient that one process computes from

    objective = loss + Σ over blocks of the mean over micro batches of the auxiliary loss.

Under tensor parallelism a loss or metric is *partial*: this rank's part of a sum over the tensor ranks. It is computed
between `TensorParallel.enter` and `leave`, where gradients are summed over the ranks. A value that is the same on every
rank is therefore divided by their number.

Context ranks have equal parts of the positions, and what they report is averaged over them. That is right for whatever
is a mean over positions. A metric that is the largest of such means, of several rows summed, is another number on a
part of the positions. So with several context ranks it is reported as the matrix of those means, which the ranks
average once a step, see `of_all_positions`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from megatron_tf.model.attention import Documents, find_documents
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import Group

if TYPE_CHECKING:
    from megatron_tf.model.layers import Block

Reports = dict[str, Tensor]  # name -> scalar, or [rows, numbers] of which each row's largest counts


class BlockContext:
    """The context of one micro batch, for all blocks of a stage.

    `documents`: None: each sample is one document.
    `loss_weight`: the weight of an auxiliary loss in the gradient. None: losses are only collected, with their graph,
        and the caller adds them to the objective.
    `branches`: factors of each sample's residual branches, [layers, branches, b] from `drop_path`; None: 1.
    `losses`, `metrics`: sums over the blocks so far, by name.
    """

    # Not a dataclass: torch's `fully_shard` copies dataclasses among a module's arguments, so additions would be lost.
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
        """Adds the losses and metrics of one block."""
        keep_graph = self.loss_weight is None
        for name, loss in losses.items():
            add_report(self.losses, name, loss if keep_graph else loss.detach())
        for name, metric in metrics.items():
            add_report(self.metrics, name, metric.detach())


def add_report(sums: Reports, name: str, value: Tensor) -> None:
    """Adds a scalar. Rows, of numbers from 0 up, are put below the others, with zeros up to the longest."""
    if name not in sums:
        sums[name] = value
    elif value.dim() == 0:
        sums[name] = sums[name] + value
    else:
        length = max(sums[name].shape[1], value.shape[1])
        sums[name] = torch.cat([F.pad(rows, (0, length - rows.shape[1])) for rows in (sums[name], value)])


def of_all_positions(metric: Tensor, context: Group) -> Tensor:
    """`metric` of `Reports` as a scalar. Of rows it is the same on all ranks of `context`, which must all call it."""
    return all_reduce(metric, context).amax(1).sum() / context.size if metric.dim() else metric


def run_blocks(blocks: Iterable[Block], hidden: Tensor, starts: Tensor | None, context: BlockContext) -> Tensor:
    """Hidden states between layers -> those after the last of `blocks`.

    `starts`: see `attention.document_starts`; None: each sample is one document.
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
