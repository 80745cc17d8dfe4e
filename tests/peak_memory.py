"""For tests that read `ru_maxrss` in a process of their own."""

from __future__ import annotations

from collections.abc import Sequence


def counted_from_zero(command: Sequence) -> list[str]:
    """`command`, through a shell: a program starts with the peak of the process that became it, here of pytest."""
    return ["sh", "-c", '"$@"; exit $?', "sh", *map(str, command)]
