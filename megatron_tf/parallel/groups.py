"""Process groups as plain arguments. A group of size 1 needs no torch.distributed at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_tf.config.topology import GridAxis, Topology


@dataclass(frozen=True)
class Group:
    """The ranks that share one piece of work. `rank` is this process's position among them.

    `handle` is the communicator, None for a group of one.  `around` is entered for each of its collectives: a clock.
    """

    size: int = 1
    rank: int = 0
    handle: dist.ProcessGroup | None = None
    around: Callable[[], AbstractContextManager[None]] = nullcontext


SINGLE = Group()


def make_group(topology: Topology, axis: GridAxis, timeout_seconds: float, backend: str | None = None) -> Group:
    """This rank's group along `axis`. Every rank of the world must call it, in the same order.

    `backend` None is the world's own; "gloo" gives a group for small CPU tensors in addition to nccl.
    """
    size, rank = getattr(topology, axis), dist.get_rank() if dist.is_initialized() else 0
    if size == 1:
        return SINGLE
    return Group(size, topology.coordinate(axis, rank), own_of(topology.groups(axis), timeout_seconds, backend))


def own_of(
    groups: Iterable[Sequence[int]], timeout_seconds: float, backend: str | None = None
) -> dist.ProcessGroup | None:
    """The communicator of that of `groups` which this rank is in, None of a rank in none.

    Every rank of the world must call it with the same groups, in the same order.
    """
    timeout, mine = timedelta(seconds=timeout_seconds), None
    for ranks in groups:
        handle = dist.new_group(list(ranks), timeout=timeout, backend=backend)
        if dist.get_rank() in ranks:
            mine = handle
    return mine
