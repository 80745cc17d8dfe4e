"""Opening a safetensors file that may be missing, damaged or no such file at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from megatron_tf.durable import open_plain
from megatron_tf.errors import CheckpointError, file_errors


@contextmanager
def open_safetensors(path: Path, remedy: str = "Copy it again", damaged: str | None = None) -> Iterator[safe_open]:
    """The open file `path`, whose tensors are read by name into main memory.

    CheckpointError with `remedy` when the file cannot be read, and with `damaged` (None: the same) when its content is
    not in the safetensors format.
    """
    with file_errors(CheckpointError, path, f"{remedy}."):
        try:
            with open_plain(path), safe_open(path, "pt") as file:
                yield file
        except SafetensorError as error:
            told = remedy if damaged is None else damaged
            raise CheckpointError(f"{path}: is no safetensors file, or a damaged one ({error}). {told}") from error
