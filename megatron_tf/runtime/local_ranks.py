"""Ranks as processes of this machine, started by a check or a measurement rather than by a launcher."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.multiprocessing

from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.architectures import ARCHITECTURES
from megatron_tf.config.optimizers import OPTIMIZERS
from megatron_tf.config.tasks import TASKS
from megatron_tf.interrupt import end_quietly
from megatron_tf.registry import Registry
from megatron_tf.telemetry.console import quiet_libraries

REGISTRIES: tuple[Registry[Any], ...] = (ACTIVATIONS, ARCHITECTURES, OPTIMIZERS, TASKS)
# Modules that ranks need and that take seconds to import. The last one brings PyTorch's compiler, which DeepSpeed
# imports when it starts an engine. Modules that are not installed are skipped.
IMPORTS = ["torch", "deepspeed", "megatron_tf.engine.deepspeed.engine", "deepspeed.runtime.zero.muon.muon_optimizer"]


def start_ranks(function: Callable[..., None], world_size: int, *arguments: object) -> None:
    """Runs `function(rank, *arguments)` in `world_size` processes and waits for them; raises when one of them fails.

    On a CPU they are forked from a forkserver that has already imported torch, which saves seconds per rank. CUDA
    cannot be forked, so GPUs use spawn. Objects that were registered in this process are registered in theirs as well.
    """
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    if method == "forkserver":
        quiet_libraries()
        multiprocessing.set_forkserver_preload(IMPORTS)
    torch.multiprocessing.start_processes(
        _with_environment,
        (dict(os.environ), [registry.added() for registry in REGISTRIES], function, arguments),
        world_size,
        start_method=method,
    )


def _with_environment(
    rank: int,
    environment: Mapping[str, str],
    added: Sequence[Mapping[str, object]],
    function: Callable[..., None],
    arguments: Sequence[object],
) -> None:
    end_quietly()  # Ctrl-C reaches the process that started the ranks as well
    gc.freeze()  # a collection would touch, and so copy, all that the forkserver has imported
    os.environ.clear()
    os.environ.update(environment)  # of the process that called `start_ranks`; the forkserver's may be outdated
    for registry, things in zip(REGISTRIES, added):
        for name, thing in things.items():
            # unpickling an argument may have imported a module that registers it
            if name not in registry:
                registry.register(name, thing)
    function(rank, *arguments)
