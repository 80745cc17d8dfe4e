"""The standard streams of a process, whatever it was started with: closed, on a full disk, or without Unicode."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


def prepare_streams() -> None:
    """Make the standard streams such that printing is safe. For the beginning of a command; may be called again.

    Descriptors that were closed (`command >&-`, some supervisors) lead to /dev/null: otherwise the next file that is
    opened gets the number, and what any library prints is written into it. A character that stdout's encoding lacks is
    shown as an escape, as stderr does. What stderr cannot take is lost: a message never ends the work that it is about.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            taken = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
            os.set_inheritable(taken, True)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, Unfailing):
        sys.stderr = cast("TextIO", Unfailing(sys.stderr))


def discard(stream: TextIO) -> None:
    """Give what is buffered, and what follows, somewhere to go. Else it raises again when Python closes the stream."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def without_terminal() -> Iterator[None]:
    """Around libraries that ask questions when stdin is a terminal: nothing here ever waits for an answer."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as empty:
        sys.stdin = empty
        try:
            yield
        finally:
            sys.stdin = before


def report(text: str) -> None:
    """Print what a long work has found. That nobody reads it any more (`... | head`) is no error of the work."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard(sys.stdout)


def flush_or_discard(stream: TextIO) -> None:
    """Write what is buffered, if that can be."""
    try:
        stream.flush()
    except OSError:
        discard(stream)


class Unfailing:
    """A text stream that loses what it cannot write. All else is that of the stream within."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
