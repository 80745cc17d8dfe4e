"""Asking a run to stop between two steps: a signal from the scheduler, or a time budget. No torch, no process group.

Schedulers announce the end of a job by a signal: SLURM by what `--signal` names and by SIGTERM, torchrun by SIGTERM.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TIME_IS_UP = 1000  # beside the numbers of signals, in `StopSignals.request`


class StopSignals:
    """Notes that this process was asked to stop. Make it before torch is imported: until then a signal kills."""

    def __init__(self) -> None:
        self._received = 0
        self._started = time.monotonic()
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def wait(self, seconds: float) -> None:
        """Returns after `seconds`, or as soon as this process was asked to stop."""
        deadline = time.monotonic() + seconds
        while not self._received and time.monotonic() < deadline:
            time.sleep(0.05)

    def request(self, max_hours: float | None) -> int:
        """0 to go on; the signal that came, or TIME_IS_UP when this process is older than `max_hours`."""
        if self._received:
            return self._received
        is_over = max_hours is not None and time.monotonic() - self._started > max_hours * 3600
        return TIME_IS_UP if is_over else 0


def describe_request(request: int) -> str:
    """A request, of any rank, in words."""
    return "run.max_hours is over" if request == TIME_IS_UP else f"a rank received {signal.Signals(request).name}"
