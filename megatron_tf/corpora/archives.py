"""Reads files from packages without installing them: Debian's .deb and source archives (.tar.gz)."""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_tf.data.preparation.compression import compression_of
from megatron_tf.errors import DataError, file_errors

AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60  # name 16, time 12, owner 6, group 6, mode 8, size 10, end 2


def members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files in a package whose name, without a leading ./, is `wanted`.

    Raises `DataError` for a package that is broken or cannot be read.
    """
    errors: tuple[type[Exception], ...] = (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, ValueError)
    try:
        with file_errors(DataError, path, "Delete it and run again."), _open_tar(path) as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isreg() and wanted(name):
                    content = archive.extractfile(member)
                    assert content is not None
                    yield name, content.read()
    except errors as error:
        raise DataError(f"{path}: is not a whole package ({error}). Delete it and run again.") from None


def _open_tar(path: Path) -> tarfile.TarFile:
    if path.suffix != ".deb":
        return tarfile.open(path, "r:gz")
    name, content = _data_member(path)
    if name.endswith(".zst"):
        compression_of(".zst", str(path))  # says which package is missing
        import zstandard

        stream: Any = zstandard.ZstdDecompressor().stream_reader(content)
        return tarfile.open(fileobj=stream, mode="r|")
    return tarfile.open(fileobj=content, mode="r:*")


def _data_member(path: Path) -> tuple[str, IO[bytes]]:
    """(name, content) of the archive of installed files in a .deb, which is an `ar` archive. ValueError for no .deb."""
    raw = path.read_bytes()
    if not raw.startswith(AR_MAGIC):
        raise ValueError(f"begins with {raw[:8]!r}")
    place = len(AR_MAGIC)
    while place + AR_HEADER_BYTES <= len(raw):
        header = raw[place : place + AR_HEADER_BYTES].decode("ascii")
        name, size = header[:16].strip().rstrip("/"), int(header[48:58])
        place += AR_HEADER_BYTES
        if name.startswith("data.tar"):
            if place + size > len(raw):
                raise ValueError("it breaks off")
            return name, io.BytesIO(raw[place : place + size])
        place += size + size % 2
    raise ValueError("it has no data.tar")
