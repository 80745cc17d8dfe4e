"""Documents to .jsonl.zst files of bounded size."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from megatron_tf.data.preparation.compression import compression_of

LEVEL = 9


class ShardWriter:
    """Context manager that writes PREFIX-00000.jsonl.zst, -00001, ...; a new file begins after `shard_bytes` of text.

    The same documents give the same files. Raises `DataError` when the package zstandard is missing.
    """

    def __init__(self, prefix: Path, shard_bytes: int):
        compression_of(".zst", f"{prefix}-00000.jsonl.zst")  # says when the package is missing
        self._prefix = prefix
        self._shard_bytes = shard_bytes
        self._number = self._size = 0
        self._stack = ExitStack()
        self._stream: Any = None

    def add(self, record: dict[str, str]) -> int:
        """Append `record` as a line; returns the bytes of its "text" in UTF-8."""
        if self._stream is None or self._size >= self._shard_bytes:
            self._next_file()
        self._stream.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
        size = len(record["text"].encode("utf-8"))
        self._size += size
        return size

    def _next_file(self) -> None:
        import zstandard

        self._stack.close()
        file = self._stack.enter_context(open(f"{self._prefix}-{self._number:05d}.jsonl.zst", "wb"))
        self._stack.callback(_sync, file)
        self._stream = self._stack.enter_context(
            zstandard.ZstdCompressor(level=LEVEL).stream_writer(file, closefd=False)
        )
        self._number, self._size = self._number + 1, 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
