"""A study's results as tables and lines below them, for a terminal and for a page in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tf.costs.law import law_of
from megatron_tf.study.comparison_words import compared, within
from megatron_tf.telemetry import text
from megatron_tf.telemetry.meters import format_duration

Json = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """`rows`: of cells; the first one is the head.  `to_left`: numbers of the columns that are aligned to the left."""

    rows: Sequence[Sequence[str]]
    to_left: tuple[int, ...] = (0,)


def in_words(found: Json) -> str:
    """The tables of a report and the lines below them, for a terminal."""
    parts = [text.table(table.rows, table.to_left) + "\n" for table in (_arms(found), *_others(found))]
    return "\n".join([*parts, *_lines(found)])


def as_page(found: Json) -> str:
    """The same in Markdown, with the pictures, to be pasted into a page."""
    parts = [text.markdown(table.rows, table.to_left) for table in (_arms_of_page(found), *_others(found))]
    parts.insert(1, f"![Validation loss against {found['unit']} and FLOPs](loss.png)")
    if any(arm["routing"] for arm in found["arms"]):
        parts.append("![What the routers do, against steps](routing.png)")
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in _lines(found))])


def _others(found: Json) -> Iterator[Table]:
    yield from _metrics(found)
    yield from (Table(*table) for table in compared(found["arms"]))
    yield from _routing(found)
    yield from _transfers(found)


def _lines(found: Json) -> Iterator[str]:
    yield from (_law_line(name, law) for name, law in found["laws"].items())
    yield from (_sweep_line(arm) for arm in found["arms"] if arm["sweep"] is not None and arm["sweep"]["losses"])
    yield (
        f"{found['runs_ended']} of {found['runs']} runs have ended: {found['flops_spent']:.2e} FLOPs, "
        f"{format_duration(found['seconds_spent'])} of training."
    )


def _arms(found: Json) -> Table:
    head = ("", "parameters", found["unit"], "FLOPs", "loss", "95 %", f"against {found['reference']}", "95 %", "")
    rows: list[Sequence[str]] = [(*head, "hours", "state")]
    rows += [(*_cells(arm, found["unit_tokens"]), *_last_cells(arm)) for arm in found["arms"]]
    return Table(rows, (0, 8))


def _cells(arm: Json, unit_tokens: int) -> tuple[str, ...]:
    loss, difference = arm["loss"], arm.get("difference")
    first = (arm["name"], f"{arm['parameters']:,}", f"{arm['tokens'] / unit_tokens:,.0f}", f"{arm['flops']:.2e}")
    if loss is None:
        return (*first, "", "", "", "", _diverged(arm) or "not ended")
    compared = ("", "", "" if arm["comparable"] else "not compared")
    if difference is not None:
        compared = (f"{difference['mean']:+.4f}", within(difference, "+.4f"), difference["verdict"])
    *numbers, verdict = compared
    verdict = ", ".join(filter(None, (verdict, _seeds(arm), _diverged(arm))))
    return (*first, f"{loss['mean']:.4f}", within(loss, ".4f"), *numbers, verdict)


def _seeds(arm: Json) -> str:
    return (
        f"{arm['ended']} of {text.count_of(arm['seeds'], 'seed')}"
        if arm["ended"] + arm["diverged"] < arm["seeds"]
        else ""
    )


def _diverged(arm: Json) -> str:
    return f"{arm['diverged']} of {text.count_of(arm['seeds'], 'seed')} diverged" if arm["diverged"] else ""


def _last_cells(arm: Json) -> tuple[str, str]:
    return ("", "") if arm["loss"] is None else (f"{arm['seconds'] / 3600:.2f}", text.size(arm["state_bytes"]))


def _arms_of_page(found: Json) -> Table:
    """Of arms that have ended. For an arm that is not compared, the difference is given with its relative cost."""
    head = ("arm", "parameters", found["unit"], "FLOPs", "loss", f"against `{found['reference']}`", "95 %", "state")
    rows: list[Sequence[str]] = [head]
    ended = [arm for arm in found["arms"] if arm["loss"] is not None]
    for arm in ended:
        about = arm.get("difference") or arm.get("difference_at_other_cost")
        is_alone = arm["ended"] == 1 < max(other["ended"] for other in ended)
        seeds = ", ".join(filter(None, ("one seed" if is_alone else _seeds(arm), _diverged(arm))))
        difference, cost = ("", "") if about is None else (f"{about['mean']:+.3f}", about.get("cost"))
        rows.append(
            (
                f"`{arm['name']}`{f' ({seeds})' if seeds else ''}",
                f"{arm['parameters']:,}",
                f"{arm['tokens'] / found['unit_tokens'] / 1e6:.2f}M",
                f"{arm['flops']:.1e}".replace("e+", "e"),
                f"{arm['loss']['mean']:.3f}",
                f"{difference}, at {cost:.2f} times the cost" if cost else difference,
                "" if about is None else within(about, "+.3f"),
                text.size(arm["state_bytes"]),
            )
        )
    return Table(rows)


def _metrics(found: Json) -> Iterator[Table]:
    """The metrics of the task for the arms that have ended; no table where it has none."""
    measured = [arm for arm in found["arms"] if arm.get("metrics")]
    rows: list[Sequence[str]] = []
    for arm in measured:
        cells = [arm["name"]]
        for value in arm["metrics"].values():
            cells += [f"{value['mean']:.4f}", within(value, ".4f")]
            difference = value["difference"]
            cells += ["", ""] if difference is None else [f"{difference['mean']:+.4f}", within(difference, "+.4f")]
        rows.append(cells)
    if not rows:
        return
    head = [""]
    for name in measured[0]["metrics"]:
        head += [name, "95 %", f"against {found['reference']}", "95 %"]
    yield Table([head, *rows])


def _routing(found: Json) -> Iterator[Table]:
    """The health of candidates, for arms that choose them: first and last measurement, the worst of the seeds."""
    rows = [
        (arm["name"], kind, f"{of['candidates']:,}", *_routing_cells(of))
        for arm in found["arms"]
        for kind, of in (arm["routing"] or {}).items()
    ]
    if rows:
        head = ("candidates", "of", "number", "from step", "fullest ×", "at the end", "evenness", "at the end")
        yield Table([(*head, "unused", "at the end", "apart", "at the end"), *rows], (0, 1))


def _routing_cells(of: Json) -> tuple[str, ...]:
    full, even, unused, apart = (of[key] for key in ("load_max", "load_spread", "unused_share", "copy_distance"))
    return (
        f"{of['steps'][0]:,}",
        f"{max(full):.2f}",
        f"{full[-1]:.2f}",
        f"{min(even):.3f}",
        f"{even[-1]:.3f}",
        *(f"{round(share * of['candidates'])}" for share in (max(unused), unused[-1])),
        f"{apart[0]:.2f}",
        f"{apart[-1]:.2f}",
    )


def _transfers(found: Json) -> Iterator[Table]:
    """For arms that take the value of another arm's sweep, next to twins with sweeps of their own."""
    rows = [
        (
            of["arm"],
            of["of"],
            f"{of['parameters'][1] / of['parameters'][0]:.1f}",
            *_optimum_cells(of["best_of"]),
            *_optimum_cells(of["best"]),
            f"{of['ratio']:.2f}",
            f"{of['difference']['mean']:+.4f}",
            within(of["difference"], "+.4f"),
            of["verdict"],
        )
        for of in found["transfers"]
    ]
    if rows:
        head = ("value of another arm", "of", "parameters ×", "best there", "range", "best here", "range", "ratio")
        yield Table([(*head, "loss against its own best", "95 %", "is the best here too"), *rows], (0, 1, 10))


def _optimum_cells(best: Json) -> tuple[str, str]:
    return f"{best['value']:.3g}", within(best, ".2g") or "at an end"


def _law_line(architecture: str, law: Json) -> str:
    missing = law.get("missing")
    return f"law of a {architecture}: {law_of(law).in_words() if missing is None else f'none; {missing}'}."


def _sweep_line(arm: Json) -> str:
    sweep = arm["sweep"]
    losses = sweep["losses"].items()
    tried = ", ".join(f"{value} {'diverged' if loss is None else f'{loss:.4f}'}" for value, loss in losses)
    text = f"{arm['name']}: {sweep['key']} tried: {tried}"
    if sweep["chosen"] is None:
        return f"{text}; the others have not ended."
    at_end = ", which is at an end of the values: a better one may lie beyond" if sweep["at_end_of_values"] else ""
    return f"{text}; chosen {sweep['chosen']:g}{at_end}."
