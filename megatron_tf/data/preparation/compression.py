"""Decompresses files into chunks of bounded size, whatever the file holds."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_tf.data.preparation.record_types import BadRecord
from megatron_tf.errors import DataError

# Few at a time, because zstandard turns four bytes into up to 128 KiB and cannot be told to stop in between.
SLICE_BYTES = 1 << 12
CHUNK_BYTES = 1 << 18
LARGEST_ZSTANDARD_WINDOW = 1 << 31  # The Pile's shards were written with long windows


class Decompressor(Protocol):
    """One frame, stream or member of a file; there may be several, one after another."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


@dataclass(frozen=True)
class Compression:
    name: str
    new: Callable[[], Decompressor]
    errors: tuple[type[Exception], ...]
    padding: bytes  # bytes that may stand between two frames and at the end


def compression_of(suffix: str, file: str) -> Compression:
    """By suffix: .zst, .gz, .xz or .bz2. Raises `DataError` when the package for it is missing."""
    if suffix == ".gz":
        return Compression("gzip", lambda: zlib.decompressobj(wbits=31), (zlib.error,), b"\0")
    if suffix == ".xz":
        return Compression("xz", lzma.LZMADecompressor, (lzma.LZMAError,), b"\0")
    if suffix == ".bz2":
        return Compression("bzip2", bz2.BZ2Decompressor, (OSError, ValueError), b"\0")
    assert suffix == ".zst", suffix
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{file}: needs the package zstandard: pip install 'megatron_tf'") from None
    library: Any = zstandard.ZstdDecompressor(max_window_size=LARGEST_ZSTANDARD_WINDOW)
    return Compression("zstandard", library.decompressobj, (zstandard.ZstdError,), b"")


def decompress(compression: Compression, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the content of the frames in `chunks`, which may be cut anywhere.

    Raises `BadRecord` when the data are broken or break off, after yielding all that came before; OSError when `chunks`
    do. (The libraries' own readers take the end of a truncated zstandard frame for the end of the data.)
    """
    frame, inside, any_frame = compression.new(), False, False
    pieces: list[bytes] = []
    size = 0
    try:
        for data in _slices(chunks):
            while data:
                if not inside:
                    data = data.lstrip(compression.padding) if compression.padding else data
                    if not data:
                        break
                    inside = any_frame = True
                piece = frame.decompress(data)
                pieces.append(piece)
                size += len(piece)
                data = b""
                if frame.eof:
                    data = frame.unused_data
                    frame, inside = compression.new(), False
            if size >= CHUNK_BYTES:
                yield b"".join(pieces)
                pieces, size = [], 0
    except compression.errors as error:
        if isinstance(error, OSError) and error.errno is not None:
            # from reading the file; bzip2's own OSErrors have no number
            raise
        yield b"".join(pieces)
        raise BadRecord("broken", f"broken {compression.name} data ({error}); the file is lost from here") from None
    yield b"".join(pieces)
    if inside or not any_frame:
        found = "break off" if any_frame else "have not even a beginning"
        raise BadRecord("truncated", f"the {compression.name} data {found}; the file is truncated")


def _slices(chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), SLICE_BYTES):
            yield chunk[start : start + SLICE_BYTES]
