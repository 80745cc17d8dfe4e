"""Nearest valid values, for the remedy in a message."""

from __future__ import annotations

import math
from collections.abc import Iterable


def multiples_near(value: int, unit: int) -> list[int]:
    """The multiples of `unit` next to `value` on both sides, none below `unit`."""
    below = value // unit * unit
    return [below, below + unit] if below > 0 else [unit]


def divisors(value: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(value) + 1) if value % size == 0]
    return sorted({*small, *(value // size for size in small)})


def divisors_near(value: int, wanted: int) -> list[int]:
    """The divisors of `value` next to `wanted`: the largest below and the smallest above."""
    sizes = divisors(value)
    below = [size for size in sizes if size < wanted][-1:]
    return below + [size for size in sizes if size > wanted][:1]


def either(values: Iterable[object]) -> str:
    """Values as "a, b or c"."""
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last


def listed(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
