"""Measures speed and correctness of a rank's device, of links between pairs of ranks, and of collectives.

The fastest repetition counts, because disturbances can only make a measurement slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.diagnosis.verdict import Link
from megatron_tf.parallel.collectives import _all_gather, _reduce_scatter

REPETITIONS = 5
SMALL_ELEMENTS = 2


@dataclass(frozen=True)
class CollectiveSpeed:
    """The speed of a collective on one rank.

    `latency`: seconds for the smallest message; `seconds`: for a whole tensor of `bytes`; `right`: whether all results
    were correct.
    """

    kind: str
    latency: float
    seconds: float
    bytes: int
    right: bool


def device_flops(device: torch.device) -> tuple[float, bool]:
    """(FLOP/s of a square matrix product, whether its result is right)."""
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    # small whole numbers: all products, and their sums in fp32, are exact
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randint(-1, 2, (size, size), generator=generator).to(device, dtype) for _ in range(2))
    seconds = _fastest(lambda: left @ right, device)
    rows = (left @ right)[:4].double().cpu()
    exact = left[:4].double().cpu() @ right.double().cpu()
    # the result in bf16 has 8 bits, so sums beyond 256 are rounded
    return 2 * size**3 / seconds, bool(torch.allclose(rows, exact, rtol=2**-8, atol=0))


def ring_rounds(world_size: int, stride: int) -> list[list[tuple[int, int]]]:
    """The links (r, (r + stride) % world_size), in at most three rounds in which each rank has at most one partner."""
    rounds: list[list[tuple[int, int]]] = [[], [], []]
    num_cycles = math.gcd(world_size, stride)
    length = world_size // num_cycles
    for start in range(num_cycles):
        cycle = [(start + i * stride) % world_size for i in range(length)]
        for i in range({1: 0, 2: 1}.get(length, length)):
            last_of_odd = length % 2 == 1 and i == length - 1
            rounds[2 if last_of_odd else i % 2].append((cycle[i], cycle[(i + 1) % length]))
    return [links for links in rounds if links]


def measure_link(rank: int, link: tuple[int, int], num_bytes: int, device: torch.device) -> Link:
    """Measures ping-pong between the two ranks of `link`, of which `rank` is one. `num_bytes`: of the large message."""
    first, second = link
    partner = second if rank == first else first

    def there_and_back(buffer: Tensor) -> None:
        if rank == first:
            dist.send(buffer, partner)
            dist.recv(buffer, partner)
        else:
            dist.recv(buffer, partner)
            dist.send(buffer, partner)

    small = torch.full((SMALL_ELEMENTS,), float(first), device=device)
    large = torch.full((max(1, num_bytes // 4),), float(first), device=device)
    if rank == second:
        small.zero_(), large.zero_()
    latency = _fastest(lambda: there_and_back(small), device) / 2
    seconds = _fastest(lambda: there_and_back(large), device) / 2
    right = bool((small == first).all()) and bool((large == first).all())
    return Link(first, second, latency, large.numel() * 4 / seconds, right)


def measure_collectives(rank: int, world_size: int, num_bytes: int, device: torch.device) -> list[CollectiveSpeed]:
    """Measures all-reduce, all-gather and reduce-scatter over all ranks, on a whole tensor of about `num_bytes`."""
    share = max(1, num_bytes // 4 // world_size)
    total = world_size * (world_size + 1) / 2
    own = torch.full((share,), rank + 1.0, device=device)
    whole = torch.empty(share * world_size, device=device)
    expected = torch.arange(1.0, world_size + 1, device=device).repeat_interleave(share)

    # Each gives (the collective alone, which is timed; whether its result is right, from new inputs).
    def all_reduce(buffer: Tensor) -> tuple[Callable[[], None], Callable[[], bool]]:
        buffer.zero_()  # sums of sums stay finite

        def is_right() -> bool:
            buffer.fill_(rank + 1.0)
            dist.all_reduce(buffer)
            return bool((buffer == total).all())

        return lambda: dist.all_reduce(buffer), is_right

    def all_gather(out: Tensor, own: Tensor, expected: Tensor) -> tuple[Callable[[], None], Callable[[], bool]]:
        def is_right() -> bool:
            _all_gather(out.fill_(0.0), own)
            return bool((out == expected).all())

        return lambda: _all_gather(out, own), is_right

    def reduce_scatter(out: Tensor) -> tuple[Callable[[], None], Callable[[], bool]]:
        given = torch.full((out.numel() * world_size,), rank + 1.0, device=device)

        def is_right() -> bool:
            _reduce_scatter(out.fill_(0.0), given)
            return bool((out == total).all())

        return lambda: _reduce_scatter(out, given), is_right

    tiny = torch.empty(world_size, device=device)
    calls = {
        "all_reduce": lambda: (all_reduce(tiny[:1]), all_reduce(whole)),
        "all_gather": lambda: (all_gather(tiny, own[:1], expected[::share]), all_gather(whole, own, expected)),
        "reduce_scatter": lambda: (reduce_scatter(tiny[:1]), reduce_scatter(torch.empty_like(own))),
    }
    speeds = []
    for kind, make in calls.items():
        small, large = make()
        latency, seconds = _fastest(small[0], device), _fastest(large[0], device)
        right = [small[1](), large[1]()]  # both, even when the first is wrong: the other ranks call both
        speeds.append(CollectiveSpeed(kind, latency, seconds, 4 * whole.numel(), all(right)))
    return speeds


def bus_bandwidth(kind: str, num_bytes: int, seconds: float, world_size: int) -> float:
    """Bytes/s over each rank's link, comparable between kinds and world sizes, as nccl-tests define it."""
    factor = 2 if kind == "all_reduce" else 1
    return factor * (world_size - 1) / world_size * num_bytes / seconds


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    call()  # the first call creates buffers and connections
    fastest = math.inf
    for _ in range(REPETITIONS):
        _finish(device)
        began = time.perf_counter()
        call()
        _finish(device)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
