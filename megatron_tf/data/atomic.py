"""Files that exist whole or not at all: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_tf.errors import DataError


def partial_path(path: Path) -> Path:
    """The name under which `path` is written. It is always the same, so a rerun reuses what a killed run left."""
    return path.with_name(path.name + ".partial")


def publish(temporary: Path, final: Path) -> None:
    """Sync `temporary` to the disk, then give it the name `final`, replacing an older file of that name."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield the temporary name to write; publish it as `path` on success, delete it when the block raises."""
    temporary = partial_path(path)
    try:
        yield temporary
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def make_parent(path: Path) -> None:
    """Create the folder that `path` will stand in. Raises `DataError` when that cannot be or it is not writable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{path.parent}: the output folder cannot be made ({error.strerror}). Choose another."
        ) from None
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path.parent}: the output folder is not writable. Choose another or change its permissions.")
