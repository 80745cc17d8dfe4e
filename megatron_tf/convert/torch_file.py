"""Reading files of torch.save without running code in them.

Such a file is a zip archive of a pickle and of the tensors' bytes. torch's own reader for weights alone makes tensors
and plain values of it; a pickle that names any other function or class is refused here before it is opened. Tensors
are memory-mapped, so that only the parts that are used are read.
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
    """The placeholder of an object whose class is not imported."""

    def __new__(cls, *arguments: object) -> Unread:
        return super().__new__(cls)

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def load_torch_file(path: Path, *, unread: tuple[str, ...] = ()) -> Any:
    """The content of a file of torch.save: tensors on the CPU, memory-mapped, and plain values.

    `unread`: packages whose classes and functions the file may name; an `Unread` takes their place.
    CheckpointError when it cannot be read, is not such a file, is damaged in its structure, or names other code.
    """
    with file_errors(CheckpointError, path, "Give a readable file of torch.save."), open_plain(path):
        pass
    try:
        foreign = sorted(get_unsafe_globals_in_checkpoint(str(path)))
    except Exception as error:  # on damaged files torch raises errors of many types
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
    """Compare the checksums in the archive with its bytes, all of which it reads. CheckpointError for damage."""
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
