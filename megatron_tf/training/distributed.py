"""Joining the ranks, before anything else of the runtime exists."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_tf.errors import LaunchError, LostContactError
from megatron_tf.host_memory import keep_freed_memory
from megatron_tf.parallel.environment import LaunchEnvironment, check_port_free, wait_for_port


def join(environment: LaunchEnvironment, timeout_seconds: float, store_file: str | None = None) -> torch.device:
    """`join_ranks`, and DeepSpeed's layer on it."""
    device = join_ranks(environment, timeout_seconds, store_file)
    _attach_deepspeed()
    return device


def join_ranks(environment: LaunchEnvironment, timeout_seconds: float, store_file: str | None = None) -> torch.device:
    """Initialises torch.distributed; returns this rank's device.

    nccl on GPUs, gloo on CPUs, where the process also keeps the memory that it frees. `store_file`: meet through this file instead of an address and a port.
    LaunchError when the port is in use or the ranks do not meet in time.
    """
    os.environ.update(
        RANK=str(environment.rank),
        WORLD_SIZE=str(environment.world_size),
        LOCAL_RANK=str(environment.local_rank),
        MASTER_ADDR=environment.master_addr,
        MASTER_PORT=str(environment.master_port),
    )
    timeout = timedelta(seconds=timeout_seconds)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if environment.local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"local rank {environment.local_rank} has no GPU: this node shows {torch.cuda.device_count()}. "
                "Start as many ranks a node as it has GPUs, or set LOCAL_RANK=0 where each task sees only its own."
            )
        device = torch.device("cuda", environment.local_rank)
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, world_size = environment.rank, environment.world_size
    if store_file is not None:
        store = dist.FileStore(store_file, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    elif world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        address, port = environment.master_addr, environment.master_port
        if rank > 0:  # torch itself would wait as long, but end in pages of its own stack
            wait_for_port(address, port, timeout_seconds)
        elif environment.launcher != "torchrun":  # torchrun's own agent holds the port
            check_port_free(address, port)
        try:
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
        except (dist.DistError, RuntimeError) as error:
            raise LostContactError(
                f"rank {rank} of {world_size} could not meet the others at MASTER_ADDR={address}, MASTER_PORT={port} within "
                f"{timeout_seconds:g} seconds: {str(error).partition(chr(10))[0]} Start all ranks with the same address and "
                "port; parallel.timeout_seconds is how long ranks wait."
            ) from error
    return device


def leave() -> None:
    """Ends torch.distributed, so that no rank is left in a collective."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _attach_deepspeed() -> None:
    import deepspeed

    # This op would be compiled at every first start on a CPU (a minute, a C++ compiler, and a lock file
    # that makes all later starts hang when a build is killed). gloo does its work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
