"""Multi-rank tests as ordinary functions: gloo ranks in processes of their own, a hang fails by timeout."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from live import PATIENCE_SECONDS

from megatron_tf.errors import exit_now
from megatron_tf.parallel.groups import Group
from megatron_tf.runtime.local_ranks import start_ranks

TIMEOUT = timedelta(seconds=PATIENCE_SECONDS)


def spawn(function: Callable[..., None], world_size: int, *arguments: object) -> None:
    """Runs `function(group, *arguments)` on `world_size` ranks; raises what any of them raised."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_rank, world_size, function, world_size, f"{folder}/store", arguments)


def spawn_each(function: Callable[..., None], world_size: int, cases: Iterable[tuple]) -> None:
    """`function(group, *case)` for each of `cases`, on ranks that are started once; an error names its case."""
    spawn(_each, world_size, function, list(cases))


def _each(group: Group, function: Callable[..., None], cases: list[tuple]) -> None:
    for case in cases:
        try:
            function(group, *case)
        except Exception as error:
            raise AssertionError(f"in the case {case}") from error


def _rank(rank: int, function: Callable[..., None], world_size: int, store: str, arguments: tuple) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    # A rank is connected before the others are. One that leaves at that moment makes their connecting fail.
    dist.barrier()
    try:
        function(Group(world_size, rank, dist.group.WORLD), *arguments)
    finally:
        dist.destroy_process_group()
    exit_now()
