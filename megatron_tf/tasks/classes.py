"""Cross-entropy over classes that are split over the tensor ranks: the tokens of a vocabulary, or kinds of images.

| tensor | local shape |
|---|---|
| labels | [...], whole on every rank |
| logits | [..., C/T], of the classes from `start` on |
| losses | [...], fp32 (fp64 for fp64 logits), whole on every rank |
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.native import can_run_triton
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import Group

IGNORED = -100  # label of a position without a loss; the default `ignore_index` of PyTorch's cross-entropy
_PART_ELEMENTS = {False: 2**18, True: 2**24}  # logits in a part, by whether they are on a GPU


class _CrossEntropy(Function):
    """loss = logΣexp(z) − z[label], with two small all-reduces: max ([...]), then Σexp and z[label] ([2, ...]).

    Saved for backward are the logits in their own type, and per row logΣexp and the local label. The softmax is
    recomputed. dz = (softmax(z) − onehot(label)) · dloss needs no communication.
    GPUs have a kernel for each pass (triton_loss.py). In PyTorch both passes work on a few rows at a time, so that a
    whole copy of the logits in the type of the loss never exists.
    """

    @staticmethod
    def forward(ctx, logits, labels, start, group):
        rows = logits.reshape(-1, logits.shape[-1])
        local = labels.reshape(-1) - start
        # -1: the label belongs to another rank, or is ignored
        local = local.masked_fill((local < 0) | (local >= rows.shape[-1]), -1)
        kernels = _kernels(rows)
        own_top, own_total, own_target = kernels.sums(rows, local) if kernels else _sums(rows, local)
        top = all_reduce(own_top, group, dist.ReduceOp.MAX)
        total, target = all_reduce(torch.stack((own_total * (own_top - top).exp_(), own_target)), group)
        log_total = total.log() + top
        ctx.save_for_backward(logits, log_total, local)
        return (log_total - target).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        logits, log_total, local = ctx.saved_tensors
        rows, scale = logits.reshape(-1, logits.shape[-1]), grad.reshape(-1)
        kernels = _kernels(rows)
        gradient = kernels.gradient if kernels else _gradient
        return gradient(rows, local, log_total, scale).view(logits.shape), None, None, None


def _kernels(rows: Tensor) -> ModuleType | None:
    """A module with kernels `sums` and `gradient` for such logits, or None."""
    if not can_run_triton(rows.device.type):
        return None
    from megatron_tf.tasks import triton_loss

    return triton_loss if rows.dtype in triton_loss.SUPPORTED_DTYPES and rows.stride(1) == 1 else None


def _sums(rows: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(max, Σ exp(z − max), z[local]) of each row, [n] each; 0 for the last where `local` is -1."""
    accumulate = torch.promote_types(rows.dtype, torch.float32)
    target = rows.gather(-1, local.clamp(min=0).unsqueeze(-1)).squeeze(-1).to(accumulate).masked_fill(local < 0, 0)
    top, total = torch.empty_like(target), torch.empty_like(target)
    for part in _parts(rows):
        top[part] = rows[part].amax(-1)
        torch.sum((rows[part] - top[part].unsqueeze(-1)).exp_(), -1, out=total[part])
    return top, total, target


def _gradient(rows: Tensor, local: Tensor, log_total: Tensor, scale: Tensor) -> Tensor:
    """(softmax − onehot(local)) · scale: [n, C/T] in the type of `rows`."""
    hit = (local >= 0).to(log_total.dtype).neg_().unsqueeze(-1)
    at = local.clamp(min=0).unsqueeze(-1)
    d_rows = torch.empty_like(rows)
    for part in _parts(rows):
        dz = (rows[part] - log_total[part].unsqueeze(-1)).exp_()
        dz.scatter_add_(-1, at[part], hit[part])
        torch.mul(dz, scale[part].unsqueeze(-1), out=d_rows[part])
    return d_rows


def _parts(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that are computed at once: small enough for a CPU's cache, large enough to keep a GPU busy."""
    size = max(1, _PART_ELEMENTS[rows.device.type == "cuda"] // rows.shape[-1])
    return (slice(first, first + size) for first in range(0, rows.shape[0], size))


def cross_entropy(logits: Tensor, labels: Tensor, start: int, group: Group) -> Tensor:
    """The loss of every row, 0 where the label is IGNORED. Differentiable in the logits.

    logits [..., C/T], of the classes from `start` on; labels int64 [...] -> [...], at least fp32.
    """
    return _CrossEntropy.apply(logits, labels, start, group).masked_fill(labels == IGNORED, 0)


def argmax(logits: Tensor, start: int, group: Group) -> Tensor:
    """The likeliest class of every row, the first of equal ones.

    logits [..., C/T], of the classes from `start` on -> int64 [...], the same on every rank.
    """
    top, at = logits.max(-1)
    best = all_reduce(top, group, dist.ReduceOp.MAX)
    foreign = torch.iinfo(at.dtype).max
    return all_reduce((at + start).masked_fill(top < best, foreign), group, dist.ReduceOp.MIN)
