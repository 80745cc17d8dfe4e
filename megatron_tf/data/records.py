"""Documents out of files: .txt (the whole file is one document), .jsonl and .jsonl.zst (one object a line)."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_tf.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")
READ_BYTES = 1 << 18


class RawRecord(NamedTuple):
    """A document before it is parsed, so that parsing can be another process's work."""

    file: str
    line: int  # counted from 1; 1 for a .txt
    payload: bytes
    problem: str | None = None  # set when the file breaks off here; there is then no payload


class BadRecord(Exception):
    """A record that holds no text; the message is the reason, without file and line."""


def expand_inputs(patterns: Iterable[str]) -> list[Path]:
    """Files and globs (`**` included) to files, each once, those of a glob in alphabetical order.

    Raises `DataError` for a pattern that matches nothing and for a suffix that is not one of `SUFFIXES`.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        literal = Path(pattern).is_file()
        matches = [pattern] if literal else [p for p in sorted(glob.glob(pattern, recursive=True)) if Path(p).is_file()]
        if not matches:
            raise DataError(f"{pattern}: no such file. Correct the path, or quote a glob so that it arrives whole.")
        found.update(dict.fromkeys(map(Path, matches)))
    for path in found:
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of input. Known are {', '.join(SUFFIXES)}.")
    return list(found)


def read_records(paths: Iterable[Path]) -> Iterator[RawRecord]:
    """All records of the files, in order. A file that breaks off ends with a record that says so. Blank lines are
    left out, but counted."""
    for path in paths:
        if path.suffix == ".txt":
            yield RawRecord(str(path), 1, path.read_bytes())
            continue
        line = 0
        try:
            with open(path, "rb") as file:
                for line, payload in enumerate(_decompressed_lines(file) if path.suffix == ".zst" else file, start=1):
                    if payload.strip():
                        yield RawRecord(str(path), line, payload)
        except BadRecord as problem:
            yield RawRecord(str(path), line + 1, b"", str(problem))


def parse_record(record: RawRecord, json_key: str) -> str:
    """Text of a record. Raises `BadRecord` with the reason when there is none."""
    if record.problem is not None:
        raise BadRecord(record.problem)
    try:
        content = record.payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start}") from None
    if record.file.endswith(".txt"):
        return content
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"invalid JSON ({error})") from None
    if not isinstance(value, dict) or json_key not in value:
        keys = f"its fields are {', '.join(sorted(value))}" if isinstance(value, dict) else "it is no JSON object"
        raise BadRecord(f"missing field {json_key!r}, {keys}")
    text = value[json_key]
    if not isinstance(text, str):
        raise BadRecord(f"field {json_key!r} is of type {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(f"field {json_key!r} has half a surrogate pair at character {error.start}") from None
    return text


def bad_record_error(file: str, line: int, reason: str) -> DataError:
    """The error of a command that does not go on after a bad record."""
    return DataError(f"{file}:{line}: {reason}. Mend or remove the record.")


def read_texts(paths: Iterable[Path], json_key: str) -> Iterator[str]:
    """Texts of the files, in order. Raises `DataError` with file and line for a bad record."""
    for record in read_records(paths):
        try:
            yield parse_record(record, json_key)
        except BadRecord as problem:
            raise bad_record_error(record.file, record.line, str(problem)) from None


def _decompressed_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a zstandard file. A long line is joined once, not once a chunk."""
    pieces: list[bytes] = []
    for chunk in _decompressed_chunks(file):
        *complete, rest = chunk.split(b"\n")
        for end in complete:
            pieces.append(end)
            yield b"".join(pieces)
            pieces = []
        if rest:
            pieces.append(rest)
    if pieces:
        yield b"".join(pieces)


def _decompressed_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Content of a file of one or more zstandard frames. Raises `BadRecord` when it is broken or breaks off.

    The library's own stream reader takes the end of a truncated frame for the end of the data.
    """
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{file.name}: needs the package zstandard: pip install 'megatron_tf'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, inside = decompressor.decompressobj(), False
    while chunk := file.read(READ_BYTES):
        while chunk:
            inside = True
            try:
                yield frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise BadRecord(f"broken zstandard data ({error}); the file is lost from here") from None
            chunk = b""
            if frame.eof:
                chunk = frame.unused_data
                frame, inside = decompressor.decompressobj(), False
    if inside:
        raise BadRecord("the zstandard data break off; the file is truncated")
