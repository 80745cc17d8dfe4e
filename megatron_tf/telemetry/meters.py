"""How fast a run is, and how long it will take. Arithmetic on a clock; no device is asked."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Peak of dense bf16 matrix products with fp32 accumulation, in FLOP/s, from the vendors' data sheets.
# The first pattern that the device's name contains decides.
_PEAK_BF16 = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("GH200", 989.4e12),
    ("H200", 989.4e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989.4e12),
    ("H800", 989.4e12),
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
    ("MI300X", 1307.4e12),
    ("MI250X", 383e12),
)


def peak_flops_per_second(device_name: str) -> float | None:
    """Peak of one device in bf16, by the name its driver gives ("NVIDIA H200"); None when not known, as for CPUs."""
    for name, peak in _PEAK_BF16:
        if re.search(rf"(?<![A-Za-z0-9]){name}(?![A-Za-z0-9])", device_name, re.IGNORECASE):
            return peak
    return None


class Throughput:
    """Speed of the whole run between two readings, and the time that is left.

    `flops_per_token`: of forward and backward pass, over the whole model.
    `peak_flops_per_second`: summed over all devices of the run; None where it is not known, then there is no MFU.
    `clock`: seconds from any fixed point, never backwards.
    """

    def __init__(
        self,
        flops_per_token: float,
        peak_flops_per_second: float | None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._flops_per_token, self._peak, self._clock = flops_per_token, peak_flops_per_second, clock
        self._since = clock()
        self._paused = 0.0
        self._steps = self._tokens = 0
        self._first_step_end: float | None = None
        self._later_steps = 0

    def step(self, tokens: int) -> None:
        """An optimizer step that trained on `tokens` tokens, over all ranks, has just ended."""
        self._steps += 1
        self._tokens += tokens
        if self._first_step_end is None:
            self._first_step_end = self._clock()
        else:
            self._later_steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here (evaluation, a checkpoint) does not count as training in the next reading."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def read(self) -> dict[str, float | None]:
        """Metrics of the steps since the last reading; all None when there was none. Starts the next interval.

        `perf/tokens_per_second` (whole run), `perf/step_seconds` (mean), `perf/mfu`: model FLOP/s as a fraction of
        the peak, None without a known peak.
        """
        now = self._clock()
        seconds, steps, tokens = now - self._since - self._paused, self._steps, self._tokens
        self._since, self._paused, self._steps, self._tokens = now, 0.0, 0, 0
        if steps == 0 or seconds <= 0:
            return {"perf/tokens_per_second": None, "perf/step_seconds": None, "perf/mfu": None}
        tokens_per_second = tokens / seconds
        mfu = tokens_per_second * self._flops_per_token / self._peak if self._peak else None
        return {"perf/tokens_per_second": tokens_per_second, "perf/step_seconds": seconds / steps, "perf/mfu": mfu}

    def eta_seconds(self, steps_left: int) -> float | None:
        """Time that `steps_left` steps take at the pace so far, evaluations and checkpoints included.

        The first step, which compiles and warms up, does not count; None until a second one is done.
        """
        if steps_left == 0:
            return 0.0
        if self._first_step_end is None or self._later_steps == 0:
            return None
        return (self._clock() - self._first_step_end) / self._later_steps * steps_left


def format_duration(seconds: float | None) -> str:
    """ "0:42", "1:02:03", "3d 04:05:06"; "?" when not known."""
    if seconds is None:
        return "?"
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}:{seconds_left:02}"
    return f"{hours}:{minutes:02}:{seconds_left:02}" if hours else f"{minutes}:{seconds_left:02}"
