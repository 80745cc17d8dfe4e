"""The results of `comparison`, as rows of tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Json = dict[str, Any]
Rows = Sequence[Sequence[str]]


def compared(arms: Sequence[Json]) -> Iterator[tuple[Rows, tuple[int, ...]]]:
    """The tables that are not empty: arms against families at equal FLOPs and at equal time, speeds, and the gain of
    growth.

    Each is (rows, numbers of the columns that are aligned to the left).
    """
    timed = [arm for arm in arms if arm["clock"] is not None]
    costs = [("FLOPs", arm["name"], arm["cost_against"]) for arm in arms]
    costs += [("time", arm["name"], arm["clock"]["cost_against"]) for arm in timed]
    for what in ("FLOPs", "time"):
        rows = [row for of, name, against in costs if of == what for row in _rows_against(name, against)]
        if rows:
            head = (f"at equal {what}, at equal loss", "against", "loss", "95 %", "", f"{what} ×", "95 %", "")
            yield [head, *rows], (0, 1, 4, 7)
    if timed:
        clock = [(arm["name"], *_clock_cells(arm["clock"])) for arm in timed]
        yield [("by the clock", "tokens a second", "speed ×", "hours in all"), *clock], (0,)
    grown = [_grown_row(arm) for arm in arms if arm["growth"] is not None]
    if grown:
        scratch = "its size from scratch: FLOPs ×"
        sizes = ("all sizes: FLOPs", "from scratch ×", "95 %", "")
        yield [("growth", scratch, "95 %", "κ", "95 %", "pays above", *sizes), *grown], (0, 9)


def _clock_cells(clock: Json) -> tuple[str, ...]:
    relative = "" if clock["relative_speed"] is None else f"{clock['relative_speed']:.2f}"
    return f"{clock['speed']:,.0f}", relative, f"{clock['seconds'] / 3600:.3f}"


def _rows_against(arm: str, costs: Json) -> Iterator[tuple[str, ...]]:
    for name, cost in costs.items():
        difference = cost["difference"]
        loss = ("", "", "beyond its budgets")
        if difference is not None:
            loss = (f"{difference['mean']:+.4f}", within(difference, "+.4f"), difference["verdict"])
        yield (arm, name, *loss, factor(cost), within(cost, ".2f"), _beyond(cost, name))


def _beyond(cost: Json, name: str) -> str:
    told = {"at most": f"loss not reached by {name}", "at least": f"{name} may reach it before its first point"}
    both = f"some seeds have lower losses than all of {name}, others higher ones"
    return told.get(cost["bound"], "" if cost["ratio"] is not None else both)


def _grown_row(arm: Json) -> tuple[str, ...]:
    found = arm["growth"]
    scratch, kappa, sizes = found["from_scratch"], found["kappa"], found["all_sizes"]
    cells = ("not measured", "") if scratch is None else (factor(scratch), within(scratch, ".2f"))
    worth = ("", "") if kappa is None else (factor(kappa, "mean"), within(kappa, ".2f"))
    in_all = ("", "", "", "")
    if sizes is not None:
        missing = ", ".join(sizes["sizes_missing"])
        about = f"no run from scratch of the size of {missing}" if missing else ""
        in_all = (f"{sizes['flops']:.2e}", factor(sizes), within(sizes, ".2f"), about)
    return (arm["name"], *cells, *worth, f"{found['break_even']:.2f}", *in_all)


def factor(values: Json, key: str = "ratio") -> str:
    """The number at `key`, with "at most" or "at least" if it is a bound; "?" where it is not known."""
    if values[key] is None:
        return "?"
    return f"{values['bound'] + ' ' if values.get('bound') else ''}{values[key]:.2f}"


def within(values: Json, form: str) -> str:
    """The interval in words; "" without one."""
    return "" if values["low"] is None else f"{values['low']:{form}} to {values['high']:{form}}"
