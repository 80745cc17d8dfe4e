"""Tokenizers' files are data from strangers: what is opened, how much of it, and how the libraries fail on it."""

from __future__ import annotations

from pathlib import Path

from megatron_tf.durable import read_plain
from megatron_tf.errors import DataError, file_errors

# Ten times the largest in use.
LARGEST_FILE = 1 << 28


def read_tokenizer_file(path: Path) -> bytes:
    """Its content. Raises `DataError` when it is missing, no plain file, or larger than any tokenizer."""
    with file_errors(DataError, path, "The tokenizer cannot be read: correct the path or make the file readable."):
        return read_plain(path, LARGEST_FILE)


def is_library_failure(error: BaseException) -> bool:
    """Whether a library gave up. A panic in one that is written in Rust is no `Exception`, but must not end the work."""
    return (isinstance(error, Exception) and not isinstance(error, MemoryError)) or (
        type(error).__name__ == "PanicException"
    )
