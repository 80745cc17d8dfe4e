"""Control-C while a command is still importing. torch takes seconds to load, and a traceback of it tells nobody
anything.

A script calls `end_quietly` before its other imports, when it is the main program or a process that this has spawned
("__mp_main__") and that loads it again: any other importer keeps Python's own handling. `run_command` calls
`end_by_exception`, but for a rank, which has nothing to tidy up; spawned processes do their work without a word about
Control-C, which reaches their parent as well: those started under `kept_from_children` never see it, from their first
instruction on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

INTERRUPTED_EXIT_CODE = 130  # as shells have it: 128 and the signal's number
SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides


def end_quietly() -> None:
    """From here on Control-C ends this process at once, without a word; one that ignores it goes on ignoring it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


def end_by_exception() -> None:
    """From here on Control-C is a KeyboardInterrupt again, if `end_quietly` was called."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes started meanwhile never get Control-C; this one gets it at the end."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # which would start with the first process, and lets signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """A handler of Control-C that no library can swallow, as their `except:` does with a KeyboardInterrupt."""
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, SHOW_CURSOR)
    os._exit(INTERRUPTED_EXIT_CODE)
