"""A text file that grows by lines and stays intact when the disk is full or not available for a while."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


class LineFile:
    """Appends lines, each whole or not at all. A line that cannot be written is lost, and the next one is tried.

    The first of several lost lines is reported through `warn`; OSError is never raised. The file is opened for each
    line, so that writing resumes when a file system comes back.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path = path
        self._warn = warn
        self._failing = False
        self._whole_bytes: int | None = None  # where a torn line begins, which the next append cuts off

    def append(self, line: str) -> None:
        content = (line + "\n").encode("utf-8", "backslashreplace")
        try:
            with open(self.path, "ab") as file:
                end = file.tell()
                if self._whole_bytes is not None and end > self._whole_bytes:
                    end = file.truncate(self._whole_bytes)
                self._whole_bytes = end
                file.write(content)
        except OSError as error:
            if not self._failing:
                self._failing = True  # first: `warn` may append to this very file
                self._warn(
                    f"{self.path}: {error.strerror}. Its lines are lost until it can be written; the run goes on."
                )
        else:
            self._failing, self._whole_bytes = False, None


def whole_lines(content: bytes) -> list[bytes]:
    """The lines of a file that another process may be writing, or that a crash cut off. A last line without its end is
    left out."""
    return content.split(b"\n")[:-1]
