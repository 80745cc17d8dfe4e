"""Words for numbers, in messages and tables."""

from __future__ import annotations


def plural(noun: str, count: int) -> str:
    """ "step" of 1, "steps" of any other number."""
    return noun if count == 1 else f"{noun}s"
