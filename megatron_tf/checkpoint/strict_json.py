"""JSON that is not trusted: every missing, unknown, duplicate or mistyped field is named with its file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from megatron_tf.errors import CheckpointError, DamagedError


def parse_object(file: str, text: bytes) -> Fields:
    """The JSON object in `text`; `file` is how messages call it."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise DamagedError(f"{file}: the field {key!r} stands there twice")
            seen[key] = value
        return seen

    def no_constant(constant: str) -> Any:
        raise DamagedError(f"{file}: {constant} is not a JSON number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DamagedError(f"{file}: not valid JSON ({error})") from error
    return Fields(file, "", value)


class Fields:
    """Typed access to one JSON object. Every failure is a CheckpointError that names file and field."""

    def __init__(self, file: str, path: str, value: Any):
        self._file, self._path = file, path
        if not isinstance(value, dict):
            raise self.error("", f"is {_kind(value)}, expected an object")
        self._values = value

    def error(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {self._locate(key) or 'the file'} {problem}")

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
            raise self.error(key, f"is {value!r}, expected an integer of at least {minimum}")
        return value

    def positive(self, key: str) -> float:
        value = self._get(key)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self.error(key, f"is {value!r}, expected a number above 0")
        return float(value)

    def text(self, key: str) -> str:
        value = self._get(key)
        if not isinstance(value, str):
            raise self.error(key, f"is {_kind(value)}, expected a string")
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
            if type(value) is not int or value < minimum:
                raise self.error(key, f"holds {value!r}, expected integers of at least {minimum}")
        return tuple(self.array(key))

    def plain(self, key: str) -> dict[str, Any]:
        """An object whose inside is not the format's business."""
        return dict(self.object(key)._values)

    def object(self, key: str) -> Fields:
        return Fields(self._file, self._locate(key), self._get(key))

    def objects(self, key: str) -> Iterator[tuple[str, Fields]]:
        """An object of objects, one by one."""
        inner = self.object(key)
        for name in inner:
            yield name, inner.object(name)

    def _get(self, key: str) -> Any:
        if key not in self._values:
            raise self.error(key, "is missing")
        return self._values[key]

    def _locate(self, key: str) -> str:
        return ".".join(part for part in (self._path, key) if part)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
