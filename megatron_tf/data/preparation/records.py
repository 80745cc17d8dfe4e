"""Reads documents: the records of files, and the text of a record. The formats are in formats.py."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_tf.data.preparation.formats import file_records
from megatron_tf.data.preparation.record_types import BadRecord, RawRecord, ReadLimits
from megatron_tf.errors import DataError, file_errors

MOST_LOOKED_AT = 1000  # records: bounds the search for a second document when nearly all records are bad


def read_records(
    paths: Iterable[Path], limits: ReadLimits | None = None, on_read: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[RawRecord]:
    """Yields all records of the files, in order; a part of a file that cannot be read is a record that says so.

    Blank lines are left out, but count for line numbers. `on_read` is told how many bytes of the files were read.
    Raises `DataError` for a file that cannot be read at all.
    """
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
    text = _json_text(content, json_key) if record.is_json else content
    if not text:
        raise BadRecord("empty", "the document is empty")
    return text


class _Fields(dict[str, Any]):
    """A JSON object; `repeated` are the keys that it has more than once."""

    repeated: frozenset[str] = frozenset()


def _fields(pairs: list[tuple[str, Any]]) -> _Fields:
    fields = _Fields(pairs)
    if len(fields) != len(pairs):
        fields.repeated = frozenset(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return fields


# Numbers are not needed, and Python refuses to read integers of thousands of digits.
_DECODER = json.JSONDecoder(object_pairs_hook=_fields, parse_int=lambda digits: 0)


def _json_text(content: str, json_key: str) -> str:
    # Concatenated files can have a byte order mark in the middle.
    content = content.removeprefix("\ufeff")
    try:
        value = _DECODER.decode(content)
    except RecursionError:
        raise BadRecord("invalid_json", "invalid JSON, or nested too deeply to be read") from None
    except ValueError as error:
        raise BadRecord("invalid_json", f"invalid JSON ({error}){_probable_cause(content)}") from None
    if not isinstance(value, _Fields) or json_key not in value:
        if isinstance(value, _Fields):
            reason = f"its fields are {', '.join(sorted(value)):.200}{_nested_field(value, json_key)}"
        else:
            reason = f"it is no JSON object{_probable_cause(content)}"
        raise BadRecord("missing_field", f"missing field {json_key!r}, {reason}")
    if json_key in value.repeated:
        raise BadRecord("repeated_field", f"field {json_key!r} is there more than once, and only one could be read")
    text = value[json_key]
    if not isinstance(text, str):
        kind = "object" if isinstance(text, _Fields) else type(text).__name__
        raise BadRecord("not_text", f"field {json_key!r} is of type {kind}, not a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"field {json_key!r} has half a surrogate pair at character {error.start}"
        raise BadRecord("not_utf8", reason) from None
    return text


def _probable_cause(content: str) -> str:
    """Why a line is not a JSON object, and what to do, as the end of a message; "" when that cannot be guessed."""
    if "\0" in content:
        return "; it has NUL characters, as files have that were cut off by a crash"
    if "\r" in content:
        return "; it has line ends of carriage returns alone: turn them into newlines (tr '\\r' '\\n')"
    if content.startswith("["):
        return "; write an array as one object a line (jq -c '.[]')"
    if content.startswith("{") and not content.endswith("}"):
        return "; write each object in a line of its own (jq -c .)"
    return ""


def _nested_field(value: _Fields, json_key: str) -> str:
    """The end of a message on a missing field that stands one level deeper; "" when there is none."""
    outer = next((key for key, inner in value.items() if isinstance(inner, _Fields) and json_key in inner), None)
    return "" if outer is None else f"; that within {outer!r} is not looked at: move it up"


def bad_record_error(file: str, line: int, reason: str) -> DataError:
    """The error to raise when a command ends at a bad record."""
    return DataError(f"{file}:{line}: {reason}. Correct or remove the record.")


def is_one_document(paths: Iterable[Path], limits: ReadLimits) -> bool:
    """Whether the files hold a single document. They are read up to the second one, or `MOST_LOOKED_AT` records."""
    documents = 0
    for record in islice(read_records(paths, limits), MOST_LOOKED_AT):
        with suppress(BadRecord):
            parse_record(record, limits.json_key)
            documents += 1
        if documents == 2:
            return False
    return documents == 1


def read_texts(paths: Iterable[Path], json_key: str) -> Iterator[str]:
    """Yields the texts of the files, in order, without empty ones. `DataError` with file and line for a bad record."""
    for record in read_records(paths, ReadLimits(json_key)):
        try:
            yield parse_record(record, json_key)
        except BadRecord as problem:
            if problem.kind != "empty":
                raise bad_record_error(record.file, record.line, problem.reason) from None
