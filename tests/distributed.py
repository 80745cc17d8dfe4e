"""Multi-rank tests as ordinary functions: gloo ranks in processes of their own, a hang fails by timeout.

Ranks are forked from one process that has imported what they need and has no thread running.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_tf.errors import exit_now
from megatron_tf.parallel.groups import Group

TIMEOUT = timedelta(seconds=60)

multiprocessing.set_forkserver_preload(["deepspeed", "megatron_tf.training.engine", "megatron_tf.evaluation.scoring"])


def start_ranks(function: Callable[..., None], world_size: int, *arguments: object) -> None:
    """Runs `function(rank, *arguments)` in `world_size` processes; raises what any of them raised."""
    torch.multiprocessing.start_processes(
        _with_environment, (dict(os.environ), function, arguments), world_size, start_method="forkserver"
    )


def _with_environment(rank: int, environment: dict[str, str], function: Callable[..., None], arguments: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the test's own, not that of the process they are forked from
    function(rank, *arguments)


def spawn(function: Callable[..., None], world_size: int, *arguments: object) -> None:
    """Runs `function(group, *arguments)` on `world_size` ranks; raises what any of them raised."""
    with tempfile.TemporaryDirectory() as folder:
        start_ranks(_rank, world_size, function, world_size, f"{folder}/store", arguments)


def _rank(rank: int, function: Callable[..., None], world_size: int, store: str, arguments: tuple) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size, timeout=TIMEOUT
    )
    try:
        function(Group(world_size, rank, dist.group.WORLD), *arguments)
    finally:
        dist.destroy_process_group()
    exit_now()
