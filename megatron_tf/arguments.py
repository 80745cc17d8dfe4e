"""Numbers on a command line, as types for argparse: what is no such number is a usage error that says what is expected."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def whole_number(most: int) -> Callable[[str], int]:
    """A whole number from 1 to `most`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
        return int(text)

    return parse


def number(least: float, most: float, expected: str | None = None) -> Callable[[str], float]:
    """A finite number from `least` to `most`; `expected` is how a message calls it."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected or f'a number from {least:g} to {most:g}'}")
        return value

    return parse
