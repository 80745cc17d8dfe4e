"""Vocabulary-parallel embedding lookup and cross-entropy. The vocabulary is split along its rows, like tokens.

| tensor | local shape |
|---|---|
| embedding E | [V/T, d], rows [start, stop) of the vocabulary |
| ids, labels | [...], whole on every rank |
| logits | [..., V/T] |
| loss per token | [...], fp32 (fp64 for fp64 logits), whole on every rank |
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import Group

IGNORED = -100  # label of a token that has no loss; the number that PyTorch's own cross-entropy has for it


def partial_embedding(ids: Tensor, weight: Tensor, start: int) -> Tensor:
    """Rows of this rank's shard for the ids it holds, zeros for the others: [..., d], to be summed over the group."""
    local = ids - start
    foreign = (local < 0) | (local >= weight.shape[0])
    rows = F.embedding(local.masked_fill(foreign, 0), weight)
    return rows.masked_fill(foreign.unsqueeze(-1), 0)


class _CrossEntropy(Function):
    """loss = logΣexp(z) − z[label], with three small all-reduces ([...] each): max, Σexp, z[label].

    Saved for backward: the logits as they came and logΣexp, one number a token; the softmax is recomputed.
    dz = (softmax(z) − onehot(label)) · dloss needs no communication.
    """

    @staticmethod
    def forward(ctx, logits, labels, start, group):
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        z = logits.to(accumulate)
        top = all_reduce(z.amax(-1), group, dist.ReduceOp.MAX)
        total = (z - top.unsqueeze(-1)).exp_().sum(-1)
        local = labels - start
        foreign = (local < 0) | (local >= logits.shape[-1])
        local = local.masked_fill(foreign, 0)
        target = z.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(foreign, 0)
        total, target = all_reduce(torch.stack((total, target)), group)
        log_total = total.log() + top
        ctx.save_for_backward(logits, log_total, local, foreign)
        return log_total - target

    @staticmethod
    def backward(ctx, grad):
        logits, log_total, local, foreign = ctx.saved_tensors
        dz = (logits.to(log_total.dtype) - log_total.unsqueeze(-1)).exp_()
        hit = (~foreign).to(dz.dtype).unsqueeze(-1)
        dz.scatter_add_(-1, local.unsqueeze(-1), -hit)
        return dz.mul_(grad.unsqueeze(-1)).to(logits.dtype), None, None, None


def cross_entropy(logits: Tensor, labels: Tensor, start: int, group: Group) -> Tensor:
    """Loss of every token, 0 where the label is IGNORED.

    logits [..., V/T] (columns `start` onward), labels int64 [...] -> [...].
    """
    return _CrossEntropy.apply(logits, labels, start, group).masked_fill(labels == IGNORED, 0)
