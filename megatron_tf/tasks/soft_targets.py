"""Cross-entropy with a distribution over classes as the target, and the rank of a class, over classes that are split
over the tensor ranks.

| tensor | local shape |
|---|---|
| targets | [b, C], whole on every rank: for each sample the share of every class; all 0 if it does not count |
| logits | [b, C/T], of the classes from `start` on |
| losses, ranks | [b], whole on every rank |
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import Group


class _SoftCrossEntropy(Function):
    """loss = Σt · logΣexp(z) − Σ t·z, with two small all-reduces: max ([b]), then Σexp and Σ t·z ([2, b]).

    dz = (softmax(z) · Σt − t) · dloss needs no communication.
    """

    @staticmethod
    def forward(ctx, logits, targets, start, group):
        z = logits.to(torch.promote_types(logits.dtype, torch.float32))
        mass = targets.sum(1, dtype=z.dtype)
        own = targets[:, start : start + z.shape[1]].to(z)
        top = all_reduce(z.amax(1), group, dist.ReduceOp.MAX)
        total, hit = all_reduce(torch.stack(((z - top[:, None]).exp_().sum(1), (own * z).sum(1))), group)
        log_total = total.log() + top
        ctx.save_for_backward(logits, own, mass, log_total)
        return mass * log_total - hit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, own, mass, log_total = ctx.saved_tensors
        dz = (logits.to(own) - log_total[:, None]).exp_().mul_(mass[:, None]).sub_(own)
        return dz.mul_(grad[:, None]).to(logits), None, None, None


def soft_cross_entropy(logits: Tensor, targets: Tensor, start: int, group: Group) -> Tensor:
    """The loss of every sample: [b], fp32 (fp64 for fp64 logits). Differentiable in the logits. Shapes: see above."""
    return _SoftCrossEntropy.apply(logits, targets, start, group)


def rank_of_class(logits: Tensor, labels: Tensor, start: int, group: Group) -> Tensor:
    """The number of classes ranked before the label: those with a higher logit, and lower classes with an equal one.

    logits [b, C/T], labels int64 [b] -> int64 [b], the same on every rank. The label is among the k best when this is
    below k. A NaN is ranked before every number.
    """
    local = labels - start
    foreign = (local < 0) | (local >= logits.shape[1])
    at = local.masked_fill(foreign, 0)[:, None]
    wanted = all_reduce(logits.gather(1, at)[:, 0].masked_fill(foreign, 0), group)[:, None]
    behind = (torch.arange(logits.shape[1], device=logits.device) + start) >= labels[:, None]
    before = ~((logits < wanted) | ((logits == wanted) & behind))
    return all_reduce(before.sum(1), group)
