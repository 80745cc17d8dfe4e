"""Documents out of files: which files, their records, and the text of a record. The formats are in formats.py."""

from __future__ import annotations

import glob
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_tf.data.formats import KNOWN, file_records, is_known
from megatron_tf.data.record_types import BadRecord, RawRecord, ReadLimits
from megatron_tf.errors import DataError, file_errors


def expand_inputs(patterns: Iterable[str]) -> list[Path]:
    """Files and globs (`**` included) to files, each once, those of a glob in alphabetical order.

    Raises `DataError` for a pattern that matches nothing, for what is no file or cannot be looked at, and for a name
    of no known format.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        with file_errors(DataError, pattern, "Correct the path or make it readable."):
            try:
                mode = os.stat(pattern).st_mode
            except (FileNotFoundError, NotADirectoryError):
                matches = [match for match in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(match)]
                if not matches:
                    raise DataError(
                        f"{pattern}: no such file. Correct the path, or quote a glob so that it arrives whole."
                    ) from None
            else:
                matches = [pattern]
                if not stat.S_ISREG(mode):
                    raise DataError(f"{pattern}: is no file. Name the files in a folder as a quoted glob: '*.jsonl'.")
        found.update(dict.fromkeys(map(Path, matches)))
    for path in found:
        if not is_known(path.name):
            raise DataError(f"{path}: unknown kind of input. Known are {KNOWN}.")
    return list(found)


def read_records(
    paths: Iterable[Path], limits: ReadLimits | None = None, on_read: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[RawRecord]:
    """All records of the files, in order; what cannot be read in a file is a record that says so. Blank lines are left
    out, but counted. `on_read` is told the bytes read of the files. Raises `DataError` for a file that cannot be read
    at all."""
    for path in paths:
        with file_errors(DataError, path, "Make it readable, or leave it out."):
            yield from file_records(path, limits or ReadLimits(), on_read)


def parse_record(record: RawRecord, json_key: str) -> str:
    """Text of a record, not empty. Raises `BadRecord` with the reason when there is none."""
    if record.problem is not None:
        raise BadRecord(*record.problem)
    try:
        content = record.payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("not_utf8", f"not UTF-8 at byte {error.start}") from None
    if record.line == 1:
        content = content.removeprefix("\ufeff")  # a byte order mark, which some programs begin every file with
    text = _json_text(content, json_key) if record.is_json else content
    if not text:
        raise BadRecord("empty", "the document is empty")
    return text


def _json_text(content: str, json_key: str) -> str:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRecord("invalid_json", f"invalid JSON ({error})") from None
    if not isinstance(value, dict) or json_key not in value:
        keys = f"its fields are {', '.join(sorted(value))}" if isinstance(value, dict) else "it is no JSON object"
        raise BadRecord("missing_field", f"missing field {json_key!r}, {keys:.200}")
    text = value[json_key]
    if not isinstance(text, str):
        raise BadRecord("not_text", f"field {json_key!r} is of type {type(text).__name__}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"field {json_key!r} has half a surrogate pair at character {error.start}"
        raise BadRecord("not_utf8", reason) from None
    return text


def bad_record_error(file: str, line: int, reason: str) -> DataError:
    """The error of a command that does not go on after a bad record."""
    return DataError(f"{file}:{line}: {reason}. Mend or remove the record.")


def read_texts(paths: Iterable[Path], json_key: str) -> Iterator[str]:
    """Texts of the files, in order; empty ones are left out. Raises `DataError` with file and line for a bad record."""
    for record in read_records(paths, ReadLimits(json_key)):
        try:
            yield parse_record(record, json_key)
        except BadRecord as problem:
            if problem.kind != "empty":
                raise bad_record_error(record.file, record.line, problem.reason) from None
