"""Loss against tokens or steps, from the metrics.jsonl of one or several runs. matplotlib is an optional extra."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_tf.config.yaml_core import parse_yaml
from megatron_tf.durable import atomic_path, prepare_output
from megatron_tf.errors import UserError, write_errors
from megatron_tf.telemetry.records import read_records
from megatron_tf.text_files import read_text_file

XAxis = Literal["tokens", "steps", "flops", "hours"]
LEGEND_ROWS = 28  # that fit into the height of `plot_ends`
LABELS: dict[XAxis, str] = {
    "tokens": "training tokens",
    "steps": "optimizer steps",
    "flops": "training floating-point operations",
    "hours": "hours of training, by speeds that were measured in turns",
}


@dataclass(frozen=True)
class RunCurve:
    """What one run logged. `grown`: it began from a smaller model, as the `growth` section of its config.yml says."""

    name: str
    grown: bool
    records: tuple[dict[str, Any], ...]

    def position(self, record: dict[str, Any], axis: XAxis) -> float:
        value = record.get("step" if axis == "steps" else axis)
        return math.nan if value is None else float(value)

    def points(self, metric: str, axis: XAxis) -> tuple[list[float], list[float]]:
        """Positions and values of the records that hold a number for `metric`."""
        held = [record for record in self.records if record.get(metric) is not None]
        return [self.position(record, axis) for record in held], [float(record[metric]) for record in held]


def read_run(folder: Path) -> RunCurve:
    """The run in `folder`, even while it is being written, or after a crash that tore its last line.

    UserError with file and line when it is not a run folder, has no records, or has an invalid one.
    """
    records = read_records(folder)
    settings = folder / "config.yml"
    config, _ = parse_yaml(read_text_file(UserError, settings, "Name the run.dir of a run.", 2**24), str(settings))
    if not records:
        raise UserError(f"{folder / 'metrics.jsonl'}: holds no record yet. Wait for the first logged step.")
    name = os.fsencode(folder.resolve().name).decode("utf-8", "backslashreplace").replace("$", r"\$")  # no formula
    return RunCurve(name, bool(isinstance(config, dict) and config.get("growth")), records)


def starts(runs: Sequence[RunCurve], axis: XAxis) -> list[float]:
    """The offset of each run's positions, so that a grown run begins where the run before it ended.

    Only steps need it: they begin at 0 in every run, while tokens are counted from the very first stage on.
    """
    offsets: list[float] = []
    for number, run in enumerate(runs):
        if axis == "steps" and run.grown and number > 0:
            before = runs[number - 1]
            offsets.append(offsets[-1] + before.position(before.records[-1], axis))
        else:
            offsets.append(0.0)
    return offsets


def plot_runs(runs: Sequence[RunCurve], output: Path, axis: XAxis = "tokens") -> None:
    """Draw training loss (lines) and validation loss (points) of `runs` into `output`; its suffix says the format.

    A vertical line marks where a grown run begins. UserError when matplotlib is missing, or `output` cannot be
    written.
    """
    figure = new_figure(output, (8, 5))
    axes = figure.add_subplot()
    marked = False
    for number, (run, offset) in enumerate(zip(runs, starts(runs, axis), strict=True)):
        color = f"C{number}"
        at, loss = run.points("train/loss", axis)
        axes.plot([x + offset for x in at], loss, color=color, linewidth=1, label=run.name)
        at, loss = run.points("eval/loss", axis)
        if at:
            axes.plot([x + offset for x in at], loss, "o", color=color, markersize=4, label=f"{run.name}, validation")
        if run.grown:
            begin = run.position(run.records[0], axis) + offset
            axes.axvline(begin, color="grey", linestyle="--", linewidth=1, label=None if marked else "growth")
            marked = True
    _label(axes, axis)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    save_figure(figure, output)


@dataclass(frozen=True)
class Ends:
    """The results of runs that differ only in their seed: validation losses, or other `values`.

    `parent`: the name of the runs that they started from.  `hours`: of training, parents included; None: not known.
    """

    name: str
    tokens: int
    flops: float
    values: tuple[float, ...]
    parent: str | None = None
    hours: float | None = None


def plot_ends(ends: Sequence[Ends], output: Path, label: str | None = None, unit: str = "tokens") -> None:
    """Draw the final validation loss, or the value that `label` names, against samples, FLOPs and, if all are known,
    hours. A point is the mean over seeds, with a bar from the least to the greatest; a thin line leads to it from the
    parent. UserError as in `plot_runs`.

    `unit`: what `Ends.tokens` counts, "tokens" or "images".
    """
    axis_names: list[XAxis] = ["tokens", "flops"]
    if all(end.hours is not None for end in ends):
        axis_names.append("hours")
    legend_columns = math.ceil(len(ends) / LEGEND_ROWS)
    figure = new_figure(output, (6.5 * len(axis_names) + 2 * legend_columns, 6))
    by_name = {end.name: end for end in ends}
    for axes, axis in zip(figure.subplots(1, len(axis_names), sharey=True), axis_names):
        for number, end in enumerate(ends):
            color, at, mean = f"C{number % 10}", getattr(end, axis), _mean(end.values)
            spread = [[mean - min(end.values)], [max(end.values) - mean]]
            marker = "osD^vP"[number // 10 % 6]
            axes.errorbar([at], [mean], yerr=spread, fmt=marker, color=color, markersize=5, capsize=3, label=end.name)
            if end.parent in by_name:
                before = by_name[end.parent]
                line = [getattr(before, axis), at], [_mean(before.values), mean]
                axes.plot(*line, color=color, linewidth=0.6, alpha=0.6)
        _label(axes, axis, label, unit)
        axes.set_xscale("log")
    # one for all panels, next to them: of many arms it would cover their points
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", ncols=legend_columns, fontsize="small")
    save_figure(figure, output)


def plot_panels(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    output: Path,
    x_label: str,
    *,
    is_log: bool = False,
) -> None:
    """Draw a panel for each key of `panels`, the label of its y axis, with a line (x, y) for each name; two panels in a
    row. `is_log`: over log x. UserError as in `plot_runs`."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(output, (6.5 * columns, 4 * rows))
    for axes, (label, lines) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels.items()):
        if is_log:
            axes.set_xscale("log")
        for name, (x, y) in lines.items():
            axes.plot(x, y, marker="o", markersize=4, linewidth=1, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, output)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def new_figure(output: Path, size: tuple[float, float]) -> Any:
    """An empty matplotlib figure of `size` inches; UserError when it could not be drawn into `output` later."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "Drawing needs matplotlib, which is not installed. Install it with `pip install -e '.[plot]'`."
        ) from None
    figure = Figure(figsize=size, layout="constrained")
    if output.suffix.lstrip(".").lower() not in FigureCanvasAgg(figure).get_supported_filetypes():
        raise UserError(f"--output {output}: a picture of this kind cannot be drawn. Choose .png, .pdf or .svg.")
    prepare_output(output)
    return figure


def save_figure(figure: Any, output: Path) -> None:
    with write_errors(UserError, output, "Choose another --output."), atomic_path(output) as temporary:
        figure.savefig(temporary, dpi=150, format=output.suffix.lstrip(".").lower())


def _label(axes: Any, axis: XAxis, label: str | None = None, unit: str = "tokens") -> None:
    axes.set_xlabel(f"training {unit}" if axis == "tokens" else LABELS[axis])
    axes.set_ylabel(label or f"loss (nats per {unit.removesuffix('s')})")
    axes.grid(alpha=0.3)
