"""Records out of a file of any known format, with memory bounded by the largest document that is allowed.

| name                        | content                                                                          |
|-----------------------------|----------------------------------------------------------------------------------|
| .jsonl                      | one JSON object a line                                                           |
| .txt                        | one document                                                                     |
| .tar                        | an archive of files of these formats, archives included (OpenWebText, OpenWebText2) |
| .parquet                    | one document a row                                                               |
| each but the last + .zst .gz .xz | the same, compressed                                                        |
| .tgz, and .xz of any other name  | a compressed .tar                                                           |
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_tf.data.compression import compression_of, decompress
from megatron_tf.data.parquet import parquet_records, require_pyarrow
from megatron_tf.data.record_types import BadRecord, RawRecord, ReadLimits, bad_raw

READ_BYTES = 1 << 18
KNOWN = ".jsonl, .txt, .tar, each also with .zst, .gz or .xz, .tgz and .parquet"
_NAME = re.compile(r"(?P<inner>\.jsonl|\.txt|\.tar)?(?P<outer>\.zst|\.gz|\.xz)?$")

OnRead = Callable[[int], None]  # told how many bytes of the file were read


def is_known(name: str) -> bool:
    return name.endswith(".parquet") or _kind(name) is not None


def check_packages(path: Path) -> None:
    """Raise `DataError` when a package that reads this kind of file is missing: at once, not when its turn comes."""
    kind = _kind(path.name)
    if path.name.endswith(".parquet"):
        require_pyarrow(path)
    elif kind is not None and kind[1]:
        compression_of(kind[1], str(path))


def _kind(name: str) -> tuple[str, str] | None:
    """(.jsonl, .txt or .tar; suffix of the compression or "") of a file's name; None when it is none of these."""
    if name.endswith(".tgz"):
        return ".tar", ".gz"
    match = _NAME.search(name)
    assert match is not None
    inner, outer = match["inner"] or "", match["outer"] or ""
    if not inner and outer == ".xz":  # as OpenWebText names its archives
        inner = ".tar"
    return (inner, outer) if inner else None


def file_records(path: Path, limits: ReadLimits, on_read: OnRead) -> Iterator[RawRecord]:
    """All records of a file, in order; a record that is bad is one with a `problem`. Raises OSError."""
    if path.name.endswith(".parquet"):
        yield from parquet_records(path, limits, on_read)
        return
    with open(path, "rb") as file:
        yield from _content_records(str(path), path.name, _raw_chunks(file, on_read), limits)


def _raw_chunks(file: IO[bytes], on_read: OnRead) -> Iterator[bytes]:
    while chunk := file.read(READ_BYTES):
        on_read(len(chunk))
        yield chunk


def _ignore(num_bytes: int) -> None:
    """Only what is read of the file itself counts, not what it turns into."""


def _content_records(where: str, name: str, chunks: Iterable[bytes], limits: ReadLimits) -> Iterator[RawRecord]:
    """Records of a file, or of a member of an archive, that is called `name` and reported as `where`."""
    kind = _kind(name)
    if kind is None:
        yield bad_raw(where, 1, BadRecord("unknown_member", f"unknown kind of file; known are {KNOWN}"))
        return
    inner, outer = kind
    if outer:
        chunks = decompress(compression_of(outer, where), chunks)
    if inner == ".jsonl":
        yield from _line_records(where, chunks, limits)
    elif inner == ".txt":
        yield _whole_record(where, chunks, limits)
    else:
        yield from _member_records(where, chunks, limits)


def _whole_record(where: str, chunks: Iterable[bytes], limits: ReadLimits) -> RawRecord:
    pieces: list[bytes] = []
    size = 0
    try:
        for chunk in chunks:
            size += len(chunk)
            if size <= limits.max_document_bytes:
                pieces.append(chunk)
            else:
                pieces.clear()
        if size > limits.max_document_bytes:
            raise _too_long(size, limits)
    except BadRecord as problem:
        return bad_raw(where, 1, problem)
    return RawRecord(where, 1, b"".join(pieces))


def _line_records(where: str, chunks: Iterable[bytes], limits: ReadLimits) -> Iterator[RawRecord]:
    """Lines that are not blank; blank ones are counted. A long line is joined once, not once a chunk."""
    line, size = 1, 0  # size: of the unfinished line
    pieces: list[bytes] = []

    def finished() -> Iterator[RawRecord]:
        if size > limits.max_document_bytes:
            yield bad_raw(where, line, _too_long(size, limits))
        elif payload := b"".join(pieces).strip():
            yield RawRecord(where, line, payload, is_json=True)

    try:
        for chunk in chunks:
            *ends, rest = chunk.split(b"\n")
            for end in ends:
                size += len(end)
                pieces.append(end)
                yield from finished()
                line, size, pieces = line + 1, 0, []
            size += len(rest)
            if size <= limits.max_document_bytes:
                pieces.append(rest)
            else:
                pieces = []
    except BadRecord as problem:
        yield bad_raw(where, line, problem)
        return
    yield from finished()


def _too_long(size: int, limits: ReadLimits) -> BadRecord:
    return BadRecord(
        "too_long",
        f"the record has {size} bytes, at most {limits.max_document_bytes} are read (--max-document-bytes)",
    )


def _member_records(where: str, chunks: Iterable[bytes], limits: ReadLimits) -> Iterator[RawRecord]:
    """Records of all files in a tar archive, read as a stream. A broken member does not end the archive."""
    stream: Any = _Stream(chunks)
    try:
        # The default encoding errors keep names that are no UTF-8 as they are.
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictMember) as archive:
            members: list[tarfile.TarInfo] = vars(archive)["members"]
            while (member := archive.next()) is not None:
                members.clear()  # tarfile keeps them all, which for millions of members is the memory
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None:
                    place = f"{where}:{member.name}"
                    yield from _content_records(place, member.name, _raw_chunks(content, _ignore), limits)
            rest: Any = archive.fileobj
            while piece := rest.read(READ_BYTES):  # to its end, where the checksums of compressed data are
                if piece.strip(b"\0"):
                    raise BadRecord(
                        "broken", "data after the end of the archive, which are lost; was one file appended?"
                    )
    except BadRecord as problem:
        yield bad_raw(where, 1, problem)
    except tarfile.TarError as error:
        yield bad_raw(where, 1, BadRecord("truncated", f"the archive breaks off ({error})"))


class _StrictMember(tarfile.TarInfo):
    """tarfile itself takes a damaged header, and the end of a truncated file, for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _StrictMember:
        errors: Any = tarfile
        try:
            return super().fromtarfile(archive)
        except errors.EOFHeaderError:
            raise
        except (errors.EmptyHeaderError, errors.TruncatedHeaderError):
            raise BadRecord("truncated", "the archive breaks off; the file is truncated") from None
        except tarfile.HeaderError as error:
            raise BadRecord("broken", f"a broken archive ({error}); it is lost from here") from None


class _Stream:
    """Chunks as the file that tarfile reads from."""

    def __init__(self, chunks: Iterable[bytes]):
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """At least one byte and at most `size`; none at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = memoryview(chunk)
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)
