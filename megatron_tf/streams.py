"""Makes the standard streams safe to use even if a process was started with closed ones, ones on a full disk, or ones
without Unicode."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast


def prepare_streams() -> None:
    """Make printing safe. Call it at the beginning of a command; it may be called again.

    Closed descriptors (`command >&-`, some supervisors) are opened on /dev/null. Otherwise the next file that is opened
    would get that number, and the output of libraries would be written into it. A character that stdout's encoding
    lacks is shown as an escape, as on stderr. Text that stderr cannot write is lost: printing a message must not end
    the work that it is about.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            taken = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is `descriptor`
            os.set_inheritable(taken, True)
    sys.stdin = sys.stdin or open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not isinstance(sys.stderr, Unfailing):
        sys.stderr = cast("TextIO", Unfailing(sys.stderr))


def discard(stream: TextIO) -> None:
    """Send buffered and later output to /dev/null. Otherwise Python raises again when it closes the stream."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def without_terminal() -> Iterator[None]:
    """Makes stdin empty in the block, for libraries that ask questions when it is a terminal: no command waits for an
    answer."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as empty:
        sys.stdin = empty
        try:
            yield
        finally:
            sys.stdin = before


def report(text: str) -> None:
    """Print a result of a long computation. A reader that has closed the pipe (`... | head`) is not an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard(sys.stdout)


def flush_or_discard(stream: TextIO) -> None:
    """Write the buffered output, or discard it if it cannot be written."""
    try:
        stream.flush()
    except OSError:
        discard(stream)


class Unfailing:
    """Wraps a text stream and drops text that it cannot write. All other attributes are those of the stream."""

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
