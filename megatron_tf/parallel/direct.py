"""Collectives on CPUs in one exchange, by gloo's all-to-all, instead of gloo's own.

Gloo's all-reduce and all-gather go around a ring, one step for each rank, and its reduce-scatter is an all-reduce of
which a part is kept. Here each rank sends each other rank its part at once, and the receiver reduces, in the order of
the ranks. So a number that several ranks compute has the same bits on each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.parallel.groups import Group

REDUCTIONS: dict[object, Callable[[Tensor, Tensor], Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
}
# Bytes that a rank sends in one all-reduce at most. All ranks send all of it to all, so with many ranks and bytes
# gloo's own is faster.
MOST_REDUCED = 2**20


def reduces(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> bool:
    """Whether an all-reduce of `x` should be direct."""
    return op in REDUCTIONS and (group.size - 1) * x.numel() * x.element_size() <= MOST_REDUCED


def begin_all_reduce(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Callable[[], Tensor]:
    """Starts the reduction of `x` over the group. Returns a function that waits for the result, of the same shape."""
    finish = _begin(x.expand(group.size, *x.shape), group)
    return lambda: _reduced(finish(), op)


def begin_all_gather(x: Tensor, group: Group) -> Callable[[], Tensor]:
    """Starts sending `x` to all. Returns a function that waits for every rank's x, [ranks, *x.shape]."""
    return _begin(x.expand(group.size, *x.shape), group)


def begin_reduce_scatter(parts: Tensor, group: Group) -> Callable[[], Tensor]:
    """Starts sending `parts[r]` to rank r. Returns a function that waits for the sum of those for this rank."""
    finish = _begin(parts, group)
    return lambda: _reduced(finish(), dist.ReduceOp.SUM)


def _begin(parts: Tensor, group: Group) -> Callable[[], Tensor]:
    parts = parts.contiguous()
    out = torch.empty_like(parts)
    work = dist.all_to_all_single(out.view(-1), parts.view(-1), group=group.handle, async_op=True)
    return group.result_of(work, out)


def _reduced(parts: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
    return reduce(REDUCTIONS[op], parts.unbind())
