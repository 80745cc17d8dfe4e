"""Words for numbers, and columns of them, in messages and tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence


def plural(noun: str, count: float) -> str:
    """ "step" of 1, "steps" of any other number; "processes", "batches", "epochs"."""
    with_e = noun.endswith(("s", "tch", "nch"))
    return noun + ("" if count == 1 else "es" if with_e else "s")


def count_of(count: int, noun: str) -> str:
    """The number and the noun: "1 step", "1,000 steps"."""
    return f"{count:,} {plural(noun, count)}"


def are(count: int) -> str:
    """The verb after a number of things: "is" of 1."""
    return "is" if count == 1 else "are"


def some_of(names: Sequence[str], most: int) -> str:
    """Names as "a, b and 3 more", not more than `most`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def of_which_used(used: int, count: int) -> str:
    """The end of a phrase about `count` parameters, of which a position uses `used`; empty where it uses all."""
    return f", of which a position uses {used:,}" if used < count else ""


def bullets(items: Sequence[str], most: int | None = None) -> str:
    """Lines of a list that stands below a sentence, each with its line end in front; not more than `most`."""
    shown = items[:most]
    more = [f"and {len(items) - len(shown):,} more"] if len(items) > len(shown) else []
    return "".join(f"\n  - {item}" for item in (*shown, *more))


def size(num_bytes: float) -> str:
    """Bytes in the largest unit up to GiB that leaves 1 or more: "12.5 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} GiB"


def table(rows: Sequence[Sequence[str]], to_left: Collection[int] = (0,)) -> str:
    """Rows of equally many cells in columns: those numbered `to_left` to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = (
        "  ".join(
            cell.ljust(width) if number in to_left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def markdown(rows: Sequence[Sequence[str]], to_left: Collection[int] = (0,)) -> str:
    """The same as a table of Markdown, with a minus for the hyphen of a number."""
    head, *others = ([re.sub(r"(?<![\w.])-(?=[\d.])", "−", cell) for cell in row] for row in rows)
    rule = ["---" if number in to_left else "---:" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *others))
