"""Interval arithmetic over the elements of a flattened logical tensor. All ranges are half open: [start, stop)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

Range = tuple[int, int]
Item = TypeVar("Item")


def intersect(first: Range, second: Range) -> Range | None:
    """The common part of two ranges; None when they share no element."""
    start, stop = max(first[0], second[0]), min(first[1], second[1])
    return (start, stop) if start < stop else None


def coverage_problems(size: int, ranges: Iterable[Range]) -> list[str]:
    """The reasons why `ranges` do not hold each element of [0, size) exactly once; empty when they do.

    Each problem is one phrase with both numbers, such as "nothing holds [4, 8)".
    """
    problems: list[str] = []
    reached = 0
    for start, stop in sorted(ranges):
        if start >= stop:
            problems.append(f"[{start}, {stop}) is not a range")
            continue
        if start > reached:
            problems.append(f"nothing holds [{reached}, {start})")
        elif start < reached:
            problems.append(f"[{start}, {min(stop, reached)}) is held more than once")
        reached = max(reached, stop)
    if reached < size:
        problems.append(f"nothing holds [{reached}, {size})")
    if reached > size:
        problems.append(f"a range ends at {reached}, beyond the {size} elements of the tensor")
    return problems


class RangeMap(Generic[Item]):
    """Disjoint ranges with an item each. Finds those that overlap a range in logarithmic time."""

    def __init__(self, entries: Iterable[tuple[int, int, Item]]):
        self._entries = sorted(entries, key=lambda entry: entry[0])
        self._starts = [start for start, _, _ in self._entries]

    def overlapping(self, start: int, stop: int) -> Iterator[tuple[int, int, Item]]:
        """(start, stop, item) of each entry that shares an element with [start, stop), in order, with full ranges."""
        first = max(bisect_right(self._starts, start) - 1, 0)
        for position in range(first, len(self._entries)):
            entry = self._entries[position]
            if entry[0] >= stop or start == stop:
                return
            if entry[1] > start:
                yield entry


StepRange = tuple[int, int, int]  # start, stop, optimizer steps of these elements


def clip_steps(ranges: Iterable[StepRange], start: int, stop: int) -> list[StepRange]:
    """The part of `ranges` within [start, stop), neighbours of equal step count joined."""
    clipped = []
    for first, last, steps in sorted(ranges):
        common = intersect((first, last), (start, stop))
        if common:
            clipped.append((*common, steps))
    return join_steps(clipped)


def join_steps(ranges: Sequence[StepRange]) -> list[StepRange]:
    """Sorted ranges with adjacent ones of equal step count joined into one."""
    joined: list[StepRange] = []
    for start, stop, steps in ranges:
        if joined and joined[-1][1] == start and joined[-1][2] == steps:
            joined[-1] = (joined[-1][0], stop, steps)
        else:
            joined.append((start, stop, steps))
    return joined


def add_steps(ranges: list[StepRange], start: int, stop: int, steps: int) -> None:
    """Appends a range that begins where the last one ends, or extends the last one when the steps are equal."""
    if ranges and ranges[-1][2] == steps:
        start = ranges.pop()[0]
    ranges.append((start, stop, steps))
