"""Reads records from a file of any known format, with memory bounded by the largest document allowed.

The formats are those of contents.py. Archives may hold files of every format but Parquet, also further archives
(as in OpenWebText and OpenWebText2).
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from megatron_tf.data.preparation.compression import compression_of, decompress
from megatron_tf.data.preparation.contents import (
    BYTE_ORDER_MARK,
    HEAD_BYTES,
    Content,
    content_of,
    kind_by_name,
    split_name,
)
from megatron_tf.data.preparation.parquet import parquet_records, require_pyarrow
from megatron_tf.data.preparation.record_types import BadRecord, RawRecord, ReadLimits, bad_raw
from megatron_tf.durable import open_plain

READ_BYTES = 1 << 18
MOST_NESTED = 8  # levels of compressed files and archives within each other

OnRead = Callable[[int], None]  # told how many bytes of the file were read


def inspect_file(path: Path) -> Content:
    """What a file holds; it is decompressed as far as its name does not tell. Raises OSError.

    Raises `DataError` when a package needed to read it is missing: at once, not when its turn comes.
    """
    with open_plain(path) as file:
        name, nested = path.name, 0
        head, chunks, _ = _peeked(_raw_chunks(file, _ignore))
        content = content_of(head, name)
        if content.kind == "parquet":
            require_pyarrow(path)
        while content.kind == "compressed" and nested < MOST_NESTED:
            compression = compression_of(content.detail, str(path))
            if kind_by_name(name) is not None:
                break
            head, chunks, problem = _peeked(decompress(compression, chunks))
            if problem is not None:
                # reported when the file is read, like any other damage
                break
            name, nested = split_name(name)[0], nested + 1
            content = content_of(head, name)
        return content


def file_records(path: Path, limits: ReadLimits, on_read: OnRead) -> Iterator[RawRecord]:
    """Yields all records of a file, in order; a bad one has a `problem`. OSError; `DataError` for a missing package."""
    with open_plain(path) as file:
        content = content_of(file.read(HEAD_BYTES), path.name)
        if content.kind != "parquet":
            file.seek(0)
            yield from _content_records(str(path), path.name, _raw_chunks(file, on_read), limits)
            return
    yield from parquet_records(path, limits, on_read)


def _raw_chunks(file: IO[bytes], on_read: OnRead) -> Iterator[bytes]:
    while chunk := file.read(READ_BYTES):
        on_read(len(chunk))
        yield chunk


def _ignore(num_bytes: int) -> None:
    """For data within a file: progress counts bytes of the file itself, not decompressed or unpacked ones."""


def _peeked(chunks: Iterable[bytes]) -> tuple[bytes, Iterator[bytes], BadRecord | None]:
    """(at most the first `HEAD_BYTES` bytes, all chunks from the beginning, the problem in reading the former or None).

    The first chunk that is returned has at least `HEAD_BYTES`, or all there is before the problem.
    """
    iterator = iter(chunks)
    pieces: list[bytes] = []
    size = 0
    try:
        while size < HEAD_BYTES and (piece := next(iterator, None)) is not None:
            pieces.append(piece)
            size += len(piece)
    except BadRecord as problem:
        first = b"".join(pieces)
        return first[:HEAD_BYTES], chain([first], _raising(problem)), problem
    first = b"".join(pieces)
    return first[:HEAD_BYTES], chain([first], iterator), None


def _raising(problem: BadRecord) -> Iterator[bytes]:
    yield b""
    raise problem


def _content_records(
    where: str, name: str, chunks: Iterable[bytes], limits: ReadLimits, nested: int = 0
) -> Iterator[RawRecord]:
    """Records of a file, or of a member of an archive, that is called `name` and reported as `where`.

    `nested`: how many compressed files and archives it is in.
    """
    head, content_chunks, problem = _peeked(chunks)
    content = content_of(head, name)
    if problem is not None and content.kind == "unknown":
        yield bad_raw(where, 1, problem)
    elif content.kind == "unknown":
        yield bad_raw(where, 1, BadRecord("unknown_member", content.detail))
    elif content.kind == "parquet":
        yield bad_raw(where, 1, BadRecord("unknown_member", "is a Parquet file within another file: unpack it first"))
    elif content.kind in ("compressed", "archive") and nested == MOST_NESTED:
        reason = f"is packed more than {MOST_NESTED} times over: unpack it first"
        yield bad_raw(where, 1, BadRecord("unknown_member", reason))
    elif content.kind == "compressed":
        inner = decompress(compression_of(content.detail, where), content_chunks)
        yield from _content_records(where, split_name(name)[0], inner, limits, nested + 1)
    elif content.kind == "archive":
        yield from _member_records(where, content_chunks, limits, nested + 1)
    else:
        unmarked = chain([next(content_chunks).removeprefix(BYTE_ORDER_MARK)], content_chunks)
        if content.kind == "lines":
            yield from _line_records(where, unmarked, limits)
        else:
            yield _whole_record(where, unmarked, limits)


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
    """Yields lines that are not blank, with their numbers among all. A long line is joined once, not once per chunk."""
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


def _member_records(where: str, chunks: Iterable[bytes], limits: ReadLimits, nested: int) -> Iterator[RawRecord]:
    """Yields records of all files in a tar archive, read as a stream. A broken member does not end the archive.

    A hard link is skipped: the member that it names came before it and has been read. A symbolic link is a bad record,
    because its target need not be in the archive.
    """
    stream: Any = _Stream(chunks)
    try:
        # The default handling of encoding errors keeps names that are not UTF-8.
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictMember) as archive:
            members: list[tarfile.TarInfo] = vars(archive)["members"]
            while (member := archive.next()) is not None:
                members.clear()  # tarfile keeps every member; millions of them would fill the memory
                place = f"{where}:{member.name}"
                if member.isreg() and (content := archive.extractfile(member)) is not None:
                    yield from _content_records(place, member.name, _raw_chunks(content, _ignore), limits, nested)
                elif not (member.isdir() or member.islnk()):
                    yield bad_raw(place, 1, BadRecord("unknown_member", _not_plain(member)))
            check_end(archive)
    except BadRecord as problem:
        yield bad_raw(where, 1, problem)
    except tarfile.TarError as error:
        yield bad_raw(where, 1, BadRecord("truncated", f"the archive breaks off ({error})"))


def _not_plain(member: tarfile.TarInfo) -> str:
    if member.issym():
        return f"is a link to {member.linkname!r}, and links in archives are not followed"
    return "is a device or a FIFO, not a file"


def check_end(archive: tarfile.TarFile) -> None:
    """BadRecord when data follow the end of an archive whose members have been read. It reads to the end, where
    compressed data have their checksums."""
    rest: Any = archive.fileobj
    while piece := rest.read(READ_BYTES):
        if piece.strip(b"\0"):
            raise BadRecord("broken", "data after the end of the archive, which are lost: perhaps a file was appended")


class StrictMember(tarfile.TarInfo):
    """Raises BadRecord for a damaged header and a truncated file, which tarfile takes for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> StrictMember:
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
    """The file object over `chunks` that tarfile reads from."""

    def __init__(self, chunks: Iterable[bytes]):
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """From 1 to `size` bytes; b"" at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = memoryview(chunk)
        piece, self._rest = self._rest[:size], self._rest[size:]
        return bytes(piece)
