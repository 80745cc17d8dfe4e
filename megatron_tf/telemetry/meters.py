"""Means over steps, and the speed of a run: seconds a step, tokens a second, shares of the time and of the peak."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Dense bf16 tensor-core peak in FLOP/s, without sparsity, from NVIDIA's datasheets. The first name that all
# words of are in the device's name holds, so the narrower one of two stands first.
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("B300", 2.25e15),
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("B100", 1.75e15),
    ("GH200", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)


@dataclass(frozen=True)
class Rates:
    step_seconds: float
    tokens_per_second: float  # over all ranks
    data_wait_share: float  # of the time, in which a rank waited for data, 0 to 1


class ThroughputMeter:
    """Measures training between two laps; what happens inside `paused` (evaluation, saves) does not count.

    Reading the clock does not wait for the device: call `lap` after a value of the last step was read from it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._elapsed = 0.0  # seconds of this lap before `_since`
        self._since: float | None = None  # None while stopped
        self._waited = 0.0  # seconds of this lap

    def start(self) -> None:
        """Begins the first lap, or begins the present one anew."""
        self._elapsed, self._since, self._waited = 0.0, self._clock(), 0.0

    def waited(self, seconds: float) -> None:
        """Adds the seconds that a step of this lap waited for its data, on the rank that waited longest."""
        self._waited += seconds

    def lap(self, steps: int, tokens: int) -> Rates:
        """The rates of `steps` steps on `tokens` tokens (of all ranks) since the last lap; begins the next lap.

        A lap without a step, or one that the clock is too coarse to see, has rates of 0.
        """
        now = self._clock()
        seconds = self._elapsed + (0.0 if self._since is None else now - self._since)
        self._elapsed, self._since = 0.0, None if self._since is None else now
        waited, self._waited = self._waited, 0.0
        return Rates(
            step_seconds=seconds / steps if steps else 0.0,
            tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
            data_wait_share=min(1.0, waited / seconds) if seconds > 0 else 0.0,
        )

    def pause(self) -> None:
        """Stops the clock. Nothing happens when it stands."""
        if self._since is not None:
            self._elapsed, self._since = self._elapsed + self._clock() - self._since, None

    def resume(self) -> None:
        """Starts the clock again. Nothing happens when it runs."""
        if self._since is None:
            self._since = self._clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands while the block runs; a meter that stood before stands afterwards."""
        was_running = self._since is not None
        self.pause()
        try:
            yield
        finally:
            if was_running:
                self.resume()


class MeanMeter:
    """Mean of the values since the last `take`; values that are not finite do not count."""

    def __init__(self, state: Mapping[str, Any] | None = None):
        """`state`: the `state` of an earlier meter, to go on from. None: begin anew."""
        state = state or {}
        self._total = float(state.get("total", 0.0))
        self._count = int(state.get("count", 0))

    def add(self, value: float) -> None:
        if math.isfinite(value):
            self._total += value
            self._count += 1

    def take(self) -> float | None:
        """The mean, None when there was no value; begins anew."""
        mean = self._total / self._count if self._count else None
        self._total, self._count = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        return {"total": self._total, "count": self._count}


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float | None, num_devices: int) -> float | None:
    """Model FLOPs utilisation: the model's FLOP/s over the peak of all devices; None where the peak is unknown.

    `flops_per_token`: forward and backward pass, recomputation not counted. `peak_flops`: of one device.
    """
    if not peak_flops:
        return None
    return tokens_per_second * flops_per_token / (peak_flops * num_devices)


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU as CUDA names it ("NVIDIA H100 80GB HBM3"); None for an unknown device."""
    words = device_name.lower().replace("-", " ").replace("_", " ").split()
    for name, peak in PEAK_BF16_FLOPS:
        if all(word in words for word in name.lower().split()):
            return peak
    return None


def format_duration(seconds: float) -> str:
    """3723.4 -> "1:02:03"; a day is 24:00:00."""
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
