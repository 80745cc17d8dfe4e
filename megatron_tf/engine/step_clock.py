"""Measures the phases of a step: data, forward, backward, communication, optimizer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.profiler import record_function

PHASES = ("data", "forward", "backward", "communication", "optimizer")
OTHER = "other"


class StepClock:
    """Measures the steps that it is told to measure, and costs nothing in all others.

    Phases may nest; time belongs to the innermost one. On a GPU the device's own clock is used (an event in its stream
    at each change of phase), so nothing waits. Work of the host while the device is busy then counts as no time.
    """

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()  # then ranks are on GPUs, see `runtime.joining`
        self._marks: list[tuple[float | torch.cuda.Event, str]] = []  # (time, the phase that begins then)
        self._open: list[str] = []  # empty: not measuring
        self.names_ranges = False  # also name the phases for a running profiler

    @contextmanager
    def step(self, measured: bool) -> Iterator[None]:
        """Runs one step. A measured one replaces the earlier measurement."""
        if not measured:
            yield
            return
        self._marks, self._open = [], [OTHER]
        self._mark(OTHER)
        try:
            yield
            self._mark(OTHER)
        finally:
            self._open = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time of the block belongs to the phase `name`, one of PHASES."""
        with record_function(name) if self.names_ranges else nullcontext():
            if not self._open:
                yield
                return
            self._open.append(name)
            self._mark(name)
            try:
                yield
            finally:
                self._open.pop()
                self._mark(self._open[-1])

    def shares(self) -> dict[str, float]:
        """Phase -> its share of the last measured step, with OTHER for the rest; {} without one. Waits for the GPU."""
        if not self._marks:
            return {}
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (begin, name), (end, _) in zip(self._marks, self._marks[1:]):
            seconds[name] += _between(begin, end)
        total = sum(seconds.values())
        return {name: seconds[name] / total if total else 0.0 for name in (*PHASES, OTHER)}

    def _mark(self, name: str) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((event, name))
        else:
            self._marks.append((time.perf_counter(), name))


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float) and isinstance(end, float)
        return end - begin
    return begin.elapsed_time(end)  # milliseconds: the unit does not matter for shares


def describe_shares(shares: dict[str, float]) -> str:
    """ "forward 31% backward 52% ...", without phases of less than half a percent."""
    return " ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
