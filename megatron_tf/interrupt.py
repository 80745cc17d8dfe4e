"""Handling of Ctrl-C and SIGTERM, also while a command is still importing. torch takes seconds to load, and a traceback
from inside it helps no user.

A script calls `end_quietly` before its other imports if it is the main program, or a spawned process that loads the
main program again ("__mp_main__"). Any other importer keeps Python's own handling. `run_command` then calls
`end_by_exception`, so that a command can clean up; `run_rank` does not, because a rank has nothing to clean up.
Ctrl-C reaches a parent and its child processes. Children started under `kept_from_children` never get it.

SIGTERM ends a process at once. In `terminated_by_exception`, in which `run_command` runs a command, it is an exception.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

# the convention of shells: 128 plus the signal's number
INTERRUPTED_EXIT_CODE = 130
TERMINATED_EXIT_CODE = 143
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides the cursor


class Terminated(KeyboardInterrupt):
    """SIGTERM. What cleans up after Ctrl-C cleans up after it as well."""


def end_quietly() -> None:
    """From here on Ctrl-C ends this process at once, without a message. If it ignores Ctrl-C, it still does."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_at_once)


def end_by_exception() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again, if `end_quietly` was called."""
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def terminated_by_exception() -> Iterator[None]:
    """In the block SIGTERM raises `Terminated`, and a second one ends this process at once.

    Forked children end at once. A handler that somebody has set stays, and threads other than the main one have none.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    owner = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != owner:
            os.kill(os.getpid(), number)
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes started in the block never get Ctrl-C. This process gets it when the block ends."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # otherwise it starts with the first process, and unblocks the signal again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """A handler of Ctrl-C that ends the process. A library's `except:` would swallow a KeyboardInterrupt."""
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, SHOW_CURSOR)
    os._exit(INTERRUPTED_EXIT_CODE)
