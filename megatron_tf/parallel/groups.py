"""Process groups as plain arguments. A group of size 1 needs no torch.distributed at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from megatron_tf.config.topology import GridAxis, Topology


@dataclass(frozen=True)
class Group:
    """The ranks that share one piece of work. `rank` is this process's position among them.

    `handle`: the communicator, None for a group of one.  `around`: makes the context manager that each wait for a
        collective runs in, to time it.  `direct`: exchanges go from each rank to each at once (`parallel/direct.py`).
    """

    size: int = 1
    rank: int = 0
    handle: dist.ProcessGroup | None = None
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    direct: bool = False

    def result_of(self, work: dist.Work, out: Tensor) -> Callable[[], Tensor]:
        """A function that waits for a collective that writes `out`, and returns it."""

        def finish() -> Tensor:
            with self.around():
                work.wait()
            return out

        return finish


SINGLE = Group()


def make_group(topology: Topology, axis: GridAxis, timeout_seconds: float, backend: str | None = None) -> Group:
    """This rank's group along `axis`. Every rank of the world must call it, in the same order.

    `backend`: None is that of the world; "gloo" makes a group for small CPU tensors next to one of nccl.
    """
    size, rank = getattr(topology, axis), dist.get_rank() if dist.is_initialized() else 0
    if size == 1:
        return SINGLE
    handle = own_of(topology.groups(axis), timeout_seconds, backend)
    return Group(size, topology.coordinate(axis, rank), handle, direct=dist.get_backend(handle) == "gloo")


def own_of(
    groups: Iterable[Sequence[int]], timeout_seconds: float, backend: str | None = None
) -> dist.ProcessGroup | None:
    """The communicator of the one of `groups` that contains this rank; None for a rank that is in none of them.

    Every rank of the world must call it with the same groups, in the same order.
    """
    timeout, mine = timedelta(seconds=timeout_seconds), None
    for ranks in groups:
        handle = dist.new_group(list(ranks), timeout=timeout, backend=backend)
        if dist.get_rank() in ranks:
            mine = handle
    return mine
