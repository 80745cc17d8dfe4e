"""Files that are on the disk, not only in the page cache, when a function returns."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

FILE_MODE = 0o644  # readable by others, as far as the umask allows


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[FileIO]:
    """A new file, open for unbuffered writing; flushed to the disk at the end. Fails when `path` exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
    with FileIO(descriptor, "wb") as file:
        yield file
        os.fsync(file.fileno())


def write_atomically(path: Path, content: bytes) -> None:
    """`path` either does not exist or holds all of `content`: no reader sees a half-written file."""
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.unlink(missing_ok=True)
    with new_file(unfinished) as file:
        view = memoryview(content)
        while view:
            view = view[file.write(view) :]
    os.rename(unfinished, path)


def sync_folder(path: Path) -> None:
    """Put the folder's entries (creations, renames, removals) on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
