"""Examines a job: all ranks meet, compare software and devices, and measure devices, links and collectives."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_tf.diagnosis.measure import (
    CollectiveSpeed,
    bus_bandwidth,
    device_flops,
    measure_collectives,
    measure_link,
    ring_rounds,
)
from megatron_tf.diagnosis.software import software_facts
from megatron_tf.diagnosis.verdict import Link, best_of, judge_devices, judge_facts, judge_links, worst_of
from megatron_tf.errors import UserError
from megatron_tf.runtime.device import choose_device
from megatron_tf.runtime.facts import COMMAND, agree
from megatron_tf.runtime.network import interface_problems
from megatron_tf.runtime.patient_store import Unreachable
from megatron_tf.runtime.rendezvous import Assembly, Stuck
from megatron_tf.telemetry.text import count_of

# Passing disturbances, such as other traffic, can spoil a whole measurement of a link, so each link is measured several
# times. As long as one still looks slow, all are measured again, up to DOUBTFUL_PASSES times.
LINK_PASSES = 3
DOUBTFUL_PASSES = 3
NO_OPTIONS: Mapping[str, str] = {}


@dataclass
class Diagnosis:
    """The findings. Complete on rank 0; the other ranks know only a part.

    `hosts`, `flops` (FLOP/s): by rank. `broken`, `slow`: one sentence each.
    """

    hosts: list[str] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    collectives: list[dict[str, Any]] = field(default_factory=list)  # kind, bytes, latency, seconds, bus_bandwidth
    broken: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)


def examine(
    assembly: Assembly,
    store: dist.Store,
    local_rank: int,
    num_bytes: int,
    slow_factor: float | None,
    say: Callable[[str], None] = lambda text: None,
    run: str = "",
    options: Mapping[str, str] = NO_OPTIONS,
) -> Diagnosis:
    """Runs all tests; `say` is told which one begins. Faults of the job are returned as findings. Only a mistake in
    starting it, with which no test can begin, is raised, as LaunchError or DisagreementError.

    `store`: where the ranks of `assembly` meet; `run`: see `Assembly.meet`; `options`: how the doctor was started, the
    same on all ranks. `num_bytes`: size of large messages. `slow_factor`: slow means so many times slower than the
    median; None: 1.5 on GPUs, and 3 on CPUs, where processes share cores.
    """
    found = Diagnosis()
    try:
        _examine(found, assembly, store, local_rank, num_bytes, slow_factor, say, run, options)
    except UserError:
        raise
    except Stuck as stuck:
        found.broken += _errors(assembly)
        raised = assembly.errors()
        missing = [assembly.name(rank) for rank in stuck.ranks if rank not in raised]
        if missing and not (raised and len(missing) == assembly.world_size - len(raised)):
            found.broken += _who_is_missing(missing, stuck, assembly.world_size)
        if not found.broken and assembly.rank == 0:
            found.broken.append(f"some rank only just came in time, or not at all: {stuck}")
    except Unreachable as error:
        found.broken += _errors(assembly) or [
            f"{assembly.name(0)} does not answer, nor the store that it keeps: {error}"
        ]
    except Exception as error:
        found.broken += _errors(assembly) or [f"{assembly.name(assembly.rank)}: {type(error).__name__}: {error}"]
    return found


def _examine(
    found: Diagnosis,
    assembly: Assembly,
    store: dist.Store,
    local_rank: int,
    num_bytes: int,
    slow_factor: float | None,
    say: Callable[[str], None],
    run: str,
    options: Mapping[str, str],
) -> None:
    rank, world = assembly.rank, assembly.world_size
    say(f"waiting for {count_of(world, 'rank')}")
    found.hosts = assembly.meet(run)
    agree(
        assembly,
        {COMMAND: "doctor", **options},
        list(interface_problems(os.environ, found.hosts, torch.cuda.is_available())),
    )
    names = [assembly.name(other) for other in range(world)]

    say("devices")
    device = assembly.phase("finding the device", lambda: choose_device(local_rank))
    on_gpu = device.type == "cuda"
    factor = slow_factor or (1.5 if on_gpu else 3.0)
    if facts := assembly.collect("facts", _facts(device)):
        found.broken += judge_facts(facts, names)
    assembly.phase("warming up the device", lambda: device_flops(device))
    measured = assembly.collect("device", assembly.phase("a matrix product", lambda: device_flops(device)))
    if measured:
        found.flops = [flops for flops, _ in measured]
        _add(found, judge_devices(found.flops, [right for _, right in measured], names, factor))

    timeout = timedelta(seconds=3 * assembly.timeout)  # never reached: our own phases time out earlier
    assembly.phase(
        "init_process_group",
        lambda: dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=timeout,
        ),
    )
    say("links between pairs of ranks")
    judge = partial(judge_links, names=names, hosts=found.hosts, factor=factor)
    found.links = _links(assembly, found.hosts, num_bytes, device, lambda links: bool(judge(links).slow))
    _add(found, judge(found.links))

    say("collectives between all ranks")
    speeds = assembly.phase("collectives", lambda: measure_collectives(rank, world, num_bytes, device))
    _judge_collectives(found, assembly.collect("collectives", [asdict(speed) for speed in speeds]), names)


def _links(
    assembly: Assembly,
    hosts: Sequence[str],
    num_bytes: int,
    device: torch.device,
    doubtful: Callable[[list[Link]], bool],
) -> list[Link]:
    """Measures the links of the ring of all ranks, and of the rings through the same local rank on each node.

    Returns the links on rank 0, [] on the others. All are measured LINK_PASSES times, and up to DOUBTFUL_PASSES more
    while the results are `doubtful`. The best measurement of a link counts.
    """
    rank, world = assembly.rank, assembly.world_size
    per_host = hosts.count(hosts[0])
    strides = {1} | ({per_host} if per_host < world and world % per_host == 0 else set())
    rounds = [
        (stride, number, links)
        for stride in sorted(strides)
        for number, links in enumerate(ring_rounds(world, stride), 1)
    ]
    own: dict[tuple[int, int], Link] = {}
    for link_pass in range(1, LINK_PASSES + DOUBTFUL_PASSES + 1):
        for stride, number, links in rounds:
            mine = [link for link in links if rank in link]

            def work(mine: list[tuple[int, int]] = mine) -> list[Link]:
                return [measure_link(rank, link, num_bytes, device) for link in mine]

            what = f"links of stride {stride}, round {number}, pass {link_pass}"
            for link in assembly.phase(what, work):
                pair = link.first, link.second
                own[pair] = best_of(own[pair], link) if pair in own else link
        if link_pass >= LINK_PASSES:
            found = _of_both_ends(assembly.collect(f"links, pass {link_pass}", [asdict(link) for link in own.values()]))
            if not assembly.share(f"links are doubtful, pass {link_pass}", doubtful(found)):
                break
    return found


def _of_both_ends(by_rank: Sequence[Sequence[dict[str, Any]]]) -> list[Link]:
    both: dict[tuple[int, int], list[Link]] = {}
    for links in by_rank:
        for one in links:
            both.setdefault((one["first"], one["second"]), []).append(Link(**one))
    return [worst_of(*both[pair]) for pair in sorted(both)]


def _judge_collectives(found: Diagnosis, by_rank: list[list[dict[str, Any]]], names: Sequence[str]) -> None:
    """Adds the collectives to the findings. The time of a collective is that of its slowest rank."""
    for alike in zip(*by_rank):
        speeds = [CollectiveSpeed(**one) for one in alike]
        first, seconds = speeds[0], max(speed.seconds for speed in speeds)
        found.collectives.append(
            {
                "kind": first.kind,
                "bytes": first.bytes,
                "latency": max(speed.latency for speed in speeds),
                "seconds": seconds,
                "bus_bandwidth": bus_bandwidth(first.kind, first.bytes, seconds, len(names)),
            }
        )
        wrong = [name for name, speed in zip(names, speeds) if not speed.right]
        if wrong:
            found.broken.append(f"{first.kind} gives wrong numbers on {', '.join(wrong)}")


def _facts(device: torch.device) -> dict[str, str]:
    """The facts that must be the same on all ranks."""
    facts = {**software_facts(os.environ), "device": device.type}
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
        facts["CUDA"] = str(torch.version.cuda)
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


def _errors(assembly: Assembly) -> list[str]:
    return [f"{assembly.name(rank)}: {error}" for rank, error in sorted(assembly.errors().items())]


def _who_is_missing(missing: list[str], stuck: Stuck, world_size: int) -> list[str]:
    """A sentence for each missing rank. When all are missing, no rank is to blame, but the connection between them."""
    if len(missing) == world_size:
        return [
            f"all ranks {stuck.what} in {stuck.phase}, so it is what connects them: the network interface "
            "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), a firewall, or the links between GPUs"
        ]
    return [f"{name} {stuck.what} in time: {stuck.phase}" for name in missing]


def _add(found: Diagnosis, findings: Any) -> None:
    found.broken += findings.broken
    found.slow += findings.slow
