"""Checks of the arguments of public functions. An impossible one is an ArgumentError with its name, value and range.

Checks look only at types, shapes and Python numbers, never at the values of a tensor: that would wait for its device.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

from megatron_tf.errors import ArgumentError, shown


def check_whole_number(name: str, value: Any, least: int, most: int | None = None) -> None:
    """ArgumentError unless `value` is a whole number from `least` to `most` (None: no upper limit)."""
    expected = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentError(f"{name}: {described(value)}, but {expected} is expected.")
    if int(value) < least or (most is not None and int(value) > most):
        raise ArgumentError(f"{name}: {described(value)} is out of range. It must be {expected}.")


def check_number(name: str, value: Any, expected: str, is_right: Callable[[Any], bool]) -> None:
    """ArgumentError unless `value` is a real number and `is_right(value)`; `expected` describes it in the message."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentError(f"{name}: {described(value)}, but {expected} is expected.")
    if not is_right(value):
        raise ArgumentError(f"{name}: {described(value)} is out of range. It must be {expected}.")


def check_scale(name: str, value: Any) -> None:
    """ArgumentError unless `value` can be the scale τ of a Pattention: a number above 0, at most 1e30."""
    check_number(name, value, "a number above 0, at most 1e30", lambda scale: 0 < scale <= 1e30)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """ArgumentError unless `value` is one of `choices`."""
    known = list(choices)
    if value in known:
        return
    hint = did_you_mean(str(value), known)
    raise ArgumentError(f"{name}: {described(value)}, but one of {', '.join(known)} is expected.{hint}")


def did_you_mean(name: str, known: Iterable[str], place: str = "") -> str:
    """A sentence, with a leading space, that suggests the name in `known` nearest to `name`; "" when none is near.

    `place` is written before the suggested name. Upper and lower case count as equal.
    """
    by_letters = {choice.lower(): choice for choice in known}
    near = difflib.get_close_matches(name.lower(), by_letters, n=1)
    return f" Did you mean {place}{by_letters[near[0]]}?" if near else ""


def described(value: Any) -> str:
    """A phrase for `value` in a message: "the number 0", "the text 'relu'", "a list"."""
    if value is None:
        return "nothing (None)"
    for kind, word in ((str, "text"), (bool, "truth value"), (Real, "number")):
        if isinstance(value, kind):
            return f"the {word} {shown(value)}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
