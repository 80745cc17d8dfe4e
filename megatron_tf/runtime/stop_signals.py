"""Requests to stop a run between two steps: signals of the scheduler, Ctrl-C, a time budget. No torch.

Schedulers announce the end of a job by a signal: SLURM by what `--signal` names and by SIGTERM, torchrun by SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from megatron_tf.errors import STOPPED_EXIT_CODE, exit_now
from megatron_tf.interrupt import end_at_once

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TIME_IS_UP = 1000  # result of `StopSignals.request`, larger than the numbers of signals
ECHO_SECONDS = 1.0  # torchrun passes Ctrl-C on to its ranks, which the terminal has already sent it to
NOTHING_TEXT = "\nCtrl-C: stopped before the first step; there is nothing to save.\n"
SAVING_TEXT = "\nCtrl-C: this step is finished and saved, then the run ends. Press it again to end at once.\n"


class StopSignals:
    """Notes that this process was asked to stop. Create it before torch is imported: until then a signal kills.

    Python delivers signals to the main thread only. Created in another thread, this notes none, and only the time
    budget stops the run.
    """

    def __init__(self, tells: bool = False) -> None:
        """`tells`: whether this rank says it when Ctrl-C ends it before its first step."""
        self._tells, self._has_trained = tells, False
        self._received = 0
        self._before: Callable[[int, FrameType | None], Any] | int | None = None  # what Ctrl-C did before
        self._saves = False
        self._is_main = False
        self._interrupted_at: float | None = None
        self._started = time.monotonic()
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            signal.signal(number, self._note)
        before = signal.getsignal(signal.SIGINT)
        earlier = getattr(before, "__self__", None)
        self._before = earlier._before if isinstance(earlier, StopSignals) else before
        # A process that ignores Ctrl-C, as background processes of a script do, goes on ignoring it.
        if callable(before):
            signal.signal(signal.SIGINT, self._interrupt)

    def begin_run(self) -> None:
        """Another run of this process begins: it has nothing to save yet."""
        self._has_trained = False

    @contextmanager
    def saving(self, is_main: bool) -> Iterator[None]:
        """In the block the first Ctrl-C asks to stop, as other signals do, and the second ends the process at once.

        Before and after the block there is nothing to save, and Ctrl-C does what it did before. `is_main`: this rank
        prints what Ctrl-C does.
        """
        self._saves = self._has_trained = True
        self._is_main = is_main
        try:
            yield
        finally:
            self._saves = False

    def wait(self, seconds: float) -> None:
        """Returns after `seconds`, or as soon as this process was asked to stop."""
        deadline = time.monotonic() + seconds
        while not self._received and time.monotonic() < deadline:
            time.sleep(0.05)

    def request(self, max_hours: float | None) -> int:
        """0 to go on; the signal that came first, or TIME_IS_UP when this process is older than `max_hours`."""
        if self._received:
            return self._received
        is_over = max_hours is not None and time.monotonic() - self._started > max_hours * 3600
        return TIME_IS_UP if is_over else 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._interrupted_at is not None and now - self._interrupted_at < ECHO_SECONDS:
            return
        if not self._saves:
            assert callable(self._before)
            if self._tells and not self._has_trained:
                self._write(NOTHING_TEXT)
            self._before(number, frame)
        if self._interrupted_at is not None:
            end_at_once(number, frame)
        self._interrupted_at = now
        self._note(number, frame)
        if self._is_main:
            self._write(SAVING_TEXT)

    def _write(self, text: str) -> None:
        with suppress(OSError):  # not by print: the signal may have come in the middle of one
            os.write(2, text.encode())


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """In the block a stop signal ends the process at once: for work before there is anything to save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: exit_now(STOPPED_EXIT_CODE)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def end_at_signals(code: int) -> None:
    """From here on a stop signal ends the process at once with exit code `code`; so does one that was noted already."""
    before = [signal.signal(number, lambda *_: exit_now(code)) for number in SIGNALS]
    noted = [getattr(handler, "__self__", None) for handler in before]
    if any(isinstance(stop, StopSignals) and stop.request(None) for stop in noted):
        exit_now(code)


def describe_request(request: int) -> str:
    """Why a run stops, for a request of any rank."""
    if request == TIME_IS_UP:
        return "run.max_hours is over"
    if request == signal.SIGINT:
        return "Ctrl-C was pressed"
    return f"a rank received {signal.Signals(request).name}"
