"""Reading files of torch.save without running anything that is in them.

Such a file is a zip archive of a pickle and of the tensors' bytes. torch's own reader for weights alone makes tensors
and plain values of it; a pickle that names any other function or class is refused here before it is opened. Tensors
are mapped into memory, so that a file costs what is read of it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megatron_tf.durable import open_plain
from megatron_tf.errors import CheckpointError, file_errors


class Unread:
    """Stands where a file holds an object of a class that is neither imported nor run here."""

    def __new__(cls, *arguments: object) -> Unread:
        return super().__new__(cls)

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def load_torch_file(path: Path, *, unread: tuple[str, ...] = ()) -> Any:
    """What torch.save wrote to `path`: tensors on the CPU, memory-mapped, and plain values.

    `unread`: packages, of which the file may name classes and functions: an `Unread` takes their place.
    CheckpointError when it cannot be read, is no such file, is damaged in its structure, or wants code of others.
    """
    with file_errors(CheckpointError, path, "Give a readable file of torch.save."), open_plain(path):
        pass
    try:
        foreign = sorted(get_unsafe_globals_in_checkpoint(str(path)))
    except Exception as error:  # of any type: what the bytes are decides how far torch gets with them
        raise _not_a_torch_file(path, error) from error
    wanted = [name for name in foreign if name.split(".")[0] not in unread]
    if wanted:
        raise CheckpointError(
            f"{path}: wants to run or make {', '.join(wanted)}, which weights never need; it was not opened. "
            "Take the weights from where they were published, and if they are yours, save a dict of tensors"
        )
    try:
        with safe_globals([(Unread, name) for name in foreign]):
            return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:
        raise _not_a_torch_file(path, error) from error


def check_bytes(path: Path) -> None:
    """Compare the checksums that the archive holds with its bytes; reads all of it. CheckpointError for damage."""
    try:
        with file_errors(CheckpointError, path, "Give a readable file."), zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        raise _not_a_torch_file(path, error) from error
    if damaged is not None:
        raise CheckpointError(
            f"{path}: is damaged: the bytes of {damaged} in it are not what was written. Copy it anew"
        )


def _not_a_torch_file(path: Path, error: Exception) -> CheckpointError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    return CheckpointError(f"{path}: is not a file of torch.save, or only a part of one ({reason})")
