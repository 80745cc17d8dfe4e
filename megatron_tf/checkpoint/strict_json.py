"""Reading untrusted JSON: every missing, unknown, duplicate or mistyped field is reported with its file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from megatron_tf.errors import CheckpointError, DamagedError, shown

MOST = (
    2**60 - 1
)  # of any count: steps, tokens, elements, bytes. Sums and products with it stay within 64 bits or floats
LARGEST_NUMBER = 1e300
MOST_VALUES = 1_000_000
DEEPEST = 16
LONGEST_TEXT = 8_192
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class NotJsonError(ValueError):
    """The text is not JSON, or is ambiguous, such as with duplicate fields."""


def parse_json(text: bytes, *, finite: bool = True) -> Any:
    """The value in `text`. NotJsonError, also for the same field twice in an object, characters that Unicode does not
    have, and what nests deeper, or has longer numbers, than Python reads; when `finite`, also for NaN and infinities.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise NotJsonError(f"the field {shown(key)} stands there twice")
            seen[key] = value
        return seen

    def no_constant(constant: str) -> Any:
        raise NotJsonError(f"{constant} is not a JSON number")

    try:
        decoded = text.decode("utf-8")
        value = json.loads(decoded, object_pairs_hook=no_duplicates, parse_constant=no_constant if finite else None)
        if _SURROGATE.search(decoded):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except NotJsonError:
        raise
    except (UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise NotJsonError(f"not valid JSON ({error})") from error
    except ValueError as error:  # Python's limit of digits
        raise NotJsonError("not valid JSON (a number of thousands of digits)") from error
    return value


def parse_object(file: str, text: bytes, kind: type[CheckpointError] = CheckpointError) -> Fields:
    """The JSON object in `text`; `file` is how messages call it, `kind` what is raised for a field that is wrong.

    DamagedError when `parse_json` refuses it.
    """
    try:
        value = parse_json(text)
    except NotJsonError as error:
        raise DamagedError(f"{file}: {error}") from error
    return Fields(file, "", value, kind)


class Fields:
    """Typed access to one JSON object. Every failure is a CheckpointError that names file and field."""

    def __init__(self, file: str, path: str, value: Any, kind: type[CheckpointError] = CheckpointError):
        self._file = file
        self._path = path
        self._kind = kind
        if not isinstance(value, dict):
            raise self.error("", f"is {_kind(value)}, expected an object")
        self._values = value

    def error(self, key: str, problem: str) -> CheckpointError:
        return self._kind(f"{self._file}: {self._locate(key) or 'the file'} {problem}")

    def only(self, *names: str) -> None:
        """Refuse any field that is not among `names`: it may change the meaning of the others."""
        for key in self._values:
            if key not in names:
                raise self.error(key, "is not a field of this format version")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def integer(self, key: str, minimum: int = 0) -> int:
        value = self._get(key)
        if type(value) is not int or value < minimum:
            raise self.error(key, f"is {shown(value)}, expected an integer of at least {minimum}")
        if value > MOST:
            raise self.error(key, f"is {shown(value)}, expected an integer of at most {MOST}")
        return value

    def positive(self, key: str) -> float:
        value = self._get(key)
        if type(value) not in (int, float) or not 0 < value <= LARGEST_NUMBER:
            raise self.error(key, f"is {shown(value)}, expected a number above 0")
        return float(value)

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise self.error(key, f"is {_kind(value)}, expected a string")
        if len(value) > LONGEST_TEXT:
            raise self.error(key, f"is a string of {len(value):,} characters, expected at most {LONGEST_TEXT:,}")
        return value

    def optional_text(self, key: str) -> str | None:
        return None if self._get(key) is None else self.text(key)

    def array(self, key: str) -> list[Any]:
        value = self._get(key)
        if not isinstance(value, list):
            raise self.error(key, f"is {_kind(value)}, expected a list")
        return value

    def integers(self, key: str, minimum: int = 0) -> tuple[int, ...]:
        for value in self.array(key):
            if type(value) is not int or not minimum <= value <= MOST:
                raise self.error(key, f"holds {shown(value)}, expected integers of at least {minimum}, at most {MOST}")
        return tuple(self.array(key))

    def plain(self, key: str) -> dict[str, Any]:
        """An object whose inside is not the format's business; it is of a sane size, depth and range all the same."""
        values = self.object(key)._values
        self._check_plain(key, values)
        return dict(values)

    def plain_objects(self, key: str) -> tuple[dict[str, Any], ...]:
        """A list of such objects."""
        values = self.array(key)
        if not all(isinstance(entry, dict) for entry in values):
            raise self.error(key, "must hold objects only")
        self._check_plain(key, values)
        return tuple(values)

    def object(self, key: str) -> Fields:
        return Fields(self._file, self._locate(key), self._get(key), self._kind)

    def objects(self, key: str) -> Iterator[tuple[str, Fields]]:
        """An object of objects, one by one."""
        inner = self.object(key)
        for name in inner:
            yield name, inner.object(name)

    def _check_plain(self, key: str, value: Any) -> None:
        """Without recursion, which hostile nesting would exhaust."""
        pending, seen = [(key, 0, value)], 0
        while pending:
            where, depth, value = pending.pop()
            seen += 1
            if depth > DEEPEST or seen > MOST_VALUES:
                limit = (
                    f"more than {DEEPEST} levels deep" if depth > DEEPEST else f"of more than {MOST_VALUES:,} values"
                )
                raise self.error(where, f"is {limit}, which no run writes")
            if isinstance(value, dict):
                pending += [(f"{where}.{name}", depth + 1, inner) for name, inner in value.items()]
            elif isinstance(value, list):
                pending += [(f"{where}.{number}", depth + 1, inner) for number, inner in enumerate(value)]
            elif isinstance(value, str) and len(value) > LONGEST_TEXT:
                raise self.error(where, f"is a string of {len(value):,} characters, expected at most {LONGEST_TEXT:,}")
            elif isinstance(value, (int, float)) and not -LARGEST_NUMBER <= value <= LARGEST_NUMBER:
                raise self.error(where, f"is {shown(value)}, which is out of range")

    def _get(self, key: str) -> Any:
        if key not in self._values:
            raise self.error(key, "is missing")
        return self._values[key]

    def _locate(self, key: str) -> str:
        return ".".join(part for part in (self._path, key) if part)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
