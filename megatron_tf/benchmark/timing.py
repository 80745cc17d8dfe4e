"""Speeds of several ways to do one thing, measured so that other load on the machine slows all of them equally.

Every round runs every call once, and begins with the next one. A ratio is the median of the rounds' own ratios, so load
during some rounds cancels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

LEAST_SECONDS = 0.01  # of one sample; shorter calls are repeated, so that clock and launch do not count
MOST_REPETITIONS = 1000

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call in each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def speed_against(self, other: Timing) -> float:
        """How many times as fast as `other`, measured in the same rounds."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.rounds, other.rounds))

    def median_excess(self, other: Timing) -> float:
        """Seconds more than `other` took in the same round."""
        return statistics.median(ours - theirs for ours, theirs in zip(self.rounds, other.rounds))


def interleaved(calls: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Times of `calls`, by name. Each is first run untimed, because the first call compiles and allocates."""
    repetitions = {}
    for name, call in calls.items():
        _seconds(call, 2, device)
        once = _seconds(call, 1, device)
        repetitions[name] = min(MOST_REPETITIONS, max(1, round(LEAST_SECONDS / once)))
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(_seconds(calls[name], repetitions[name], device))
    return {name: Timing(tuple(seconds)) for name, seconds in samples.items()}


def _seconds(call: Call, repetitions: int, device: torch.device) -> float:
    _finish(device)
    began = time.perf_counter()
    for _ in range(repetitions):
        call()
    _finish(device)
    return (time.perf_counter() - began) / repetitions


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
