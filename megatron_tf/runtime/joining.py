"""Joins the ranks, before anything else of the runtime exists."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_tf.errors import LaunchError, LostContactError, first_line
from megatron_tf.runtime.device import choose_device, missing_gpu
from megatron_tf.runtime.environment import LaunchEnvironment, notice_of
from megatron_tf.runtime.facts import agree
from megatron_tf.runtime.host_memory import keep_freed_memory
from megatron_tf.runtime.network import interface_problems, stay_on_this_machine
from megatron_tf.runtime.patient_store import Unreachable
from megatron_tf.runtime.rendezvous import Assembly, Stuck, open_store

# Default of `join_ranks`: nothing to compare.
NO_FACTS: Mapping[str, str] = {}


def join_ranks(
    environment: LaunchEnvironment,
    timeout_seconds: float,
    store_file: str | None = None,
    facts: Mapping[str, str] = NO_FACTS,
) -> torch.device:
    """Initialises torch.distributed; returns this rank's device.

    The backend is nccl on GPUs and gloo on CPUs, where the process also keeps the memory that it frees. `store_file`:
    ranks of one machine meet through this file instead of an address and a port. `facts`: what all ranks must share,
    see `agree`; with a `store_file` they are not compared. A single process needs no network.

    LaunchError when the port is in use, a GPU is missing or the ranks do not meet in `timeout_seconds`.
    DisagreementError when they are not the ranks of one run, or cannot work together.
    """
    timeout = timedelta(seconds=timeout_seconds)
    rank, world_size = environment.rank, environment.world_size
    on_gpu = torch.cuda.is_available()
    problems = list(_device_problems(environment))
    store: dist.Store
    if store_file is not None or world_size == 1:
        stay_on_this_machine(os.environ)
        store = dist.HashStore() if store_file is None else dist.FileStore(store_file, world_size)
        if problems:
            raise LaunchError(problems[0])
    else:
        store = _meet(environment, timeout_seconds, {**facts, "the device": "cuda" if on_gpu else "cpu"}, problems)
    device = choose_device(environment.local_rank)
    if not on_gpu:
        keep_freed_memory()
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    except (dist.DistError, RuntimeError) as error:
        reason = first_line(error)
        if isinstance(store, (dist.HashStore, dist.FileStore)):
            raise LaunchError(
                f"torch.distributed cannot start on this machine alone: {reason}. Where not even the loopback is up, "
                "give it an address: `ip link set lo up`."
            ) from error
        raise _no_meeting(
            environment,
            f": {reason} Check that the nodes reach each other: firewalls, and GLOO_SOCKET_IFNAME or "
            "NCCL_SOCKET_IFNAME. tools/doctor.py tests every link.",
        ) from error
    # Libraries read a rank's place from here. Set last: a process that did not become a rank keeps its variables.
    os.environ.update(
        RANK=str(environment.rank),
        WORLD_SIZE=str(environment.world_size),
        LOCAL_RANK=str(environment.local_rank),
        MASTER_ADDR=environment.master_addr,
        MASTER_PORT=str(environment.master_port),
    )
    return device


def _meet(
    environment: LaunchEnvironment, timeout_seconds: float, facts: Mapping[str, str], problems: list[str]
) -> dist.Store:
    """The store in which all ranks have met and agreed on `facts`. Raises the errors of `join_ranks`."""
    store = open_store(environment, timeout_seconds)
    assembly = Assembly(store, environment.rank, environment.world_size, timeout_seconds, notice_of(environment))
    try:
        hosts = assembly.meet(environment.run)
        problems += interface_problems(os.environ, hosts, torch.cuda.is_available())
        agree(assembly, facts, problems, _gpu(environment.local_rank))
    except Stuck as stuck:
        absent = ", ".join(assembly.name(rank) for rank in stuck.ranks) or "another rank"
        raise _no_meeting(
            environment,
            f" within {timeout_seconds:g} seconds: {absent} {stuck.what} ({stuck.phase}). Start all ranks with "
            "the same address and port; parallel.timeout_seconds is how long ranks wait.",
        ) from stuck
    except Unreachable as error:
        raise _no_meeting(
            environment, f": {assembly.name(0)} does not answer, or has ended, and its own output says why. ({error})"
        ) from error
    return dist.PrefixStore("process group", store)


def _device_problems(environment: LaunchEnvironment) -> Iterator[str]:
    if problem := missing_gpu(environment.local_rank):
        yield (
            f"{problem}. Start as many ranks a node as it has GPUs, or set LOCAL_RANK=0 where each task sees only its "
            "own."
        )


def _gpu(local_rank: int) -> str:
    """The UUID of this rank's GPU; "" if there is none."""
    if local_rank >= torch.cuda.device_count():
        return ""
    return str(torch.cuda.get_device_properties(local_rank).uuid)


def _no_meeting(environment: LaunchEnvironment, how: str) -> LostContactError:
    return LostContactError(
        f"rank {environment.rank} of {environment.world_size} could not meet the others at "
        f"MASTER_ADDR={environment.master_addr}, MASTER_PORT={environment.master_port}{how}"
    )


def leave() -> None:
    """Ends torch.distributed, so that no rank is left in a collective."""
    if dist.is_initialized():
        dist.destroy_process_group()
