"""Pydantic's errors as sentences of our own: the key, what was given, what is expected."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic_core import ErrorDetails

from megatron_tf.checks import did_you_mean
from megatron_tf.config.fields import NOT_REGISTERED
from megatron_tf.config.nearest import either, multiples_near
from megatron_tf.telemetry.text import count_of

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "keys with values",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "greater than"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def value_sentence(key: str, problem: ErrorDetails) -> str:
    """What is wrong with the value of a key, and what it must be. (For an unknown or a missing key, see `reason`.)"""
    kind, given, bounds = problem["type"], problem["input"], problem.get("ctx", {})
    if kind in _EXPECTED:
        return f"{key}: {describe(given)}, but {_EXPECTED[kind]} is expected."
    if (choices := _choices(problem)) is not None:
        hint = did_you_mean(str(given), choices)
        return f"{key}: {describe(given)}, but one of {', '.join(choices)} is expected.{hint}"
    if kind in _BOUNDS or kind == "finite_number":
        return f"{key}: {_number(given)} is out of range. It {reason(problem)}."
    if kind == "multiple_of":
        unit = bounds["multiple_of"]
        return f"{key}: {given} is not a multiple of {unit}. Set it to {either(multiples_near(given, unit))}."
    if kind == "too_short":
        found = count_of(bounds["actual_length"], "item")
        return f"{key}: the list has {found}. It needs at least {bounds['min_length']}."
    if kind == "too_long":
        return f"{key}: the list has {count_of(len(given), 'item')}. It holds {bounds['max_length']}."
    return f"{key}: {describe(given)} is not valid: {reason(problem)}."


def reason(problem: ErrorDetails) -> str:
    """What a value must be, as the end of a sentence on it: "must be at least 1"."""
    kind, bounds = problem["type"], problem.get("ctx", {})
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}"
    if (choices := _choices(problem)) is not None:
        return f"must be {either(choices)}"
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        limit = bounds[bound]
        return f"must be {words} {f'{limit:g}' if isinstance(limit, float) else limit}"
    if kind == "finite_number":
        return "must be a finite number"
    if kind == "multiple_of":
        return f"must be a multiple of {bounds['multiple_of']}"
    if kind in ("too_short", "too_long"):
        words, bound = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        return f"must have {words} {count_of(bounds[bound], 'item')}"
    if kind == "missing":
        return "is missing"
    if kind == "extra_forbidden":
        return "is an unknown key"
    # what a validator of ours says, or a kind that no section has
    return re.sub(r"^[A-Z]\w+ should\b", "must", problem["msg"].removeprefix("Value error, "))


def follows_from_another(problem: ErrorDetails) -> bool:
    """Whether a problem only repeats another one.

    Pydantic counts only the valid items of a list, so that a list with a bad item is also reported as too short. It
    also reports every default that it could not compute because fields it depends on have problems.
    """
    if problem["type"] == "default_factory_not_called":
        return True
    return problem["type"] == "too_short" and len(problem["input"]) >= problem["ctx"]["min_length"]


def describe(value: Any) -> str:
    """What was given, as a phrase: "the text 'abc'", "the list [1, 2]", "nothing"."""
    if value is None:
        return "nothing (null)"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    if isinstance(value, float):
        text = _number(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    if isinstance(value, bool):
        return f"the truth value {text}"
    if isinstance(value, (int, float)):
        return f"the number {text}"
    kind = "text" if isinstance(value, str) else "list" if isinstance(value, (list, tuple)) else "mapping"
    return f"the {kind} {text}"


def _number(value: Any) -> str:
    """A number, briefly if it is large or small: -7e+10, as users write it, and not -70000000000.0."""
    brief = f"{value:g}" if isinstance(value, float) else ""
    exact = str(value)
    return brief if brief and float(brief) == value and len(brief) < len(exact) - len(".0") else exact


def _choices(problem: ErrorDetails) -> list[str] | None:
    """The allowed values, when the problem is that the given one is not among them; else None."""
    bounds = problem.get("ctx", {})
    if problem["type"] == NOT_REGISTERED:
        return list(map(str, bounds["choices"]))
    if problem["type"] == "literal_error":
        return [word.strip("'") for word in bounds["expected"].replace(" or ", ", ").split(", ")]
    return None
