"""Where the time of a step goes: data, forward, backward, communication, optimizer."""

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
    """Measures the steps that it is told to, and costs nothing in all others.

    Phases may nest; time belongs to the innermost one. On a GPU the clock is the device's own (an event in its stream
    at each change of phase), so nothing waits for it, and what the host does while the device is busy takes no time.
    """

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()  # then ranks are on GPUs, see `runtime.joining`
        self._marks: list[tuple[float | torch.cuda.Event, str]] = []  # from then on it is this phase
        self._open: list[str] = []  # empty: not measuring
        self.names_ranges = False  # also name the phases for a running profiler

    @contextmanager
    def step(self, measured: bool) -> Iterator[None]:
        """One step. Of a measured one, what was measured before is forgotten."""
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
        """What happens in the block belongs to `name`, one of PHASES."""
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
        """Share of each phase and of all else in the last measured step; empty without one. Waits for the GPU."""
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
    return begin.elapsed_time(end)  # milliseconds; only shares are made of it


def describe_shares(shares: dict[str, float]) -> str:
    """ "forward 31% backward 52% ...", what takes less than half a percent left out."""
    return " ".join(f"{name} {share:.0%}" for name, share in shares.items() if share >= 0.005)
