"""Loss against tokens or steps, from the metrics.jsonl of one or several runs. matplotlib is an optional extra."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_tf.config.yaml_core import parse_yaml
from megatron_tf.errors import UserError

Axis = Literal["tokens", "steps"]


@dataclass(frozen=True)
class RunCurve:
    """What one run logged. `grown`: it began from a smaller model, as the `growth` section of its config.yml says."""

    name: str
    grown: bool
    records: tuple[dict[str, Any], ...]

    def position(self, record: dict[str, Any], axis: Axis) -> float:
        return float(record["step" if axis == "steps" else "tokens"])

    def points(self, metric: str, axis: Axis) -> tuple[list[float], list[float]]:
        """Positions and values of the records that hold a number for `metric`."""
        held = [record for record in self.records if record.get(metric) is not None]
        return [self.position(record, axis) for record in held], [float(record[metric]) for record in held]


def read_run(folder: Path) -> RunCurve:
    """The run in `folder`, also while it is being written. UserError when it has logged nothing, or not readably."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        config, _ = parse_yaml((folder / "config.yml").read_text(encoding="utf-8"), str(folder / "config.yml"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{folder} is no readable run folder: {error}. Name the run.dir of a run.") from None
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # still being written
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not all(isinstance(record[key], (int, float)) for key in ("step", "tokens")):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{path}: line {number} has no step and tokens. Mend or delete the line.") from None
        records.append(record)
    if not records:
        raise UserError(f"{path} holds no record yet. Wait for the first logged step.")
    return RunCurve(folder.resolve().name, bool(isinstance(config, dict) and config.get("growth")), tuple(records))


def starts(runs: Sequence[RunCurve], axis: Axis) -> list[float]:
    """What to add to each run's positions, so that a grown run goes on where the run before it ended.

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


def plot_runs(runs: Sequence[RunCurve], output: Path, axis: Axis = "tokens") -> None:
    """Draw training loss (lines) and validation loss (points) of `runs` into `output`; its suffix says the format.

    A vertical line marks where a grown run begins. UserError when matplotlib is missing, or `output` cannot be
    written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "Drawing needs matplotlib, which is not installed. Install it with `pip install -e '.[plot]'`."
        ) from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if output.suffix.lstrip(".") not in canvas.get_supported_filetypes():
        raise UserError(f"--output {output}: a picture of this kind cannot be drawn. Choose .png, .pdf or .svg.")
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
    axes.set_xlabel("training tokens" if axis == "tokens" else "optimizer steps")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}.") from None
