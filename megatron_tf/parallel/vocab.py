"""Vocabulary-parallel embedding lookup and cross-entropy. The vocabulary is split along its rows, like tokens.

| tensor | local shape |
|---|---|
| embedding E | [V/T, d], rows [start, stop) of the vocabulary |
| ids, labels | [...], whole on every rank |
| logits | [..., V/T] |
| loss per token | [...], fp32 (fp64 for fp64 logits), whole on every rank |
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import Group

IGNORED = -100  # label of a token that has no loss; the number that PyTorch's own cross-entropy has for it
_PART_ELEMENTS = {False: 2**18, True: 2**24}  # of logits worked on at once, on a CPU and on a GPU


def partial_embedding(ids: Tensor, weight: Tensor, start: int) -> Tensor:
    """Rows of this rank's shard for the ids it holds, zeros for the others: [..., d], to be summed over the group."""
    local = ids - start
    foreign = (local < 0) | (local >= weight.shape[0])
    rows = F.embedding(local.masked_fill(foreign, 0), weight)
    return rows.masked_fill(foreign.unsqueeze(-1), 0)


class _CrossEntropy(Function):
    """loss = logΣexp(z) − z[label], with two small all-reduces: max ([...]), then Σexp and z[label] ([2, ...]).

    Saved for backward: the logits as they came and logΣexp, one number a token; the softmax is recomputed.
    dz = (softmax(z) − onehot(label)) · dloss needs no communication.
    Both passes go through a few rows at a time, so that no copy of the logits in the type of the loss ever exists whole.
    """

    @staticmethod
    def forward(ctx, logits, labels, start, group):
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        rows = logits.reshape(-1, logits.shape[-1])
        local = labels.reshape(-1) - start
        foreign = (local < 0) | (local >= rows.shape[-1])
        local = local.masked_fill(foreign, 0)
        target = rows.gather(-1, local.unsqueeze(-1)).squeeze(-1).to(accumulate).masked_fill(foreign, 0)
        own_top, own_total = torch.empty_like(target), torch.empty_like(target)
        for part in _parts(rows):
            own_top[part] = rows[part].amax(-1)
            torch.sum((rows[part] - own_top[part].unsqueeze(-1)).exp_(), -1, out=own_total[part])
        top = all_reduce(own_top, group, dist.ReduceOp.MAX)
        total, target = all_reduce(torch.stack((own_total * (own_top - top).exp_(), target)), group)
        log_total = total.log() + top
        ctx.save_for_backward(logits, log_total, local, foreign)
        return (log_total - target).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, log_total, local, foreign = ctx.saved_tensors
        rows, scale = logits.reshape(-1, logits.shape[-1]), grad.reshape(-1, 1)
        hit = (~foreign).to(log_total.dtype).neg_().unsqueeze(-1)
        d_rows = torch.empty_like(rows)
        for part in _parts(rows):
            dz = (rows[part] - log_total[part].unsqueeze(-1)).exp_()
            dz.scatter_add_(-1, local[part].unsqueeze(-1), hit[part])
            torch.mul(dz, scale[part], out=d_rows[part])
        return d_rows.view(logits.shape), None, None, None


def _parts(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that are worked on at once: on a CPU what its cache holds, on a GPU what keeps it busy."""
    size = max(1, _PART_ELEMENTS[rows.device.type == "cuda"] // rows.shape[-1])
    return (slice(first, first + size) for first in range(0, rows.shape[0], size))


def cross_entropy(logits: Tensor, labels: Tensor, start: int, group: Group) -> Tensor:
    """Loss of every token, 0 where the label is IGNORED.

    logits [..., V/T] (columns `start` onward), labels int64 [...] -> [...].
    """
    return _CrossEntropy.apply(logits, labels, start, group).masked_fill(labels == IGNORED, 0)


def argmax(logits: Tensor, start: int, group: Group) -> Tensor:
    """The likeliest id of every token, the first of equal ones. logits [..., V/T] (columns `start` onward) -> [...]."""
    top, at = logits.max(-1)
    best = all_reduce(top, group, dist.ReduceOp.MAX)
    foreign = torch.iinfo(at.dtype).max
    return all_reduce((at + start).masked_fill(top < best, foreign), group, dist.ReduceOp.MIN)
