"""Ranks as threads of this process, around one store: for what they say to each other before they compute."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch.distributed as dist

from megatron_tf.runtime.rendezvous import Assembly


def gathering(
    rank: Callable[[Assembly], object], world_size: int, *, timeout: float = 20.0, store: dist.Store | None = None
) -> list[object]:
    """What `rank(assembly)` returns, or raises, on each of the ranks."""
    store = store or dist.HashStore()

    def outcome(number: int) -> object:
        try:
            return rank(Assembly(store, number, world_size, timeout))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(outcome, range(world_size)))
