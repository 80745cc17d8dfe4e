"""Where metrics go. A tracker that fails is dropped with a warning; it never stops training."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from megatron_tf.config.schema import RunConfig
from megatron_tf.errors import UserError

Metrics = Mapping[str, "float | int | None"]


class Tracker(Protocol):
    def log(self, metrics: Metrics, step: int) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """metrics.jsonl: one JSON object a logged step. NaN and infinity are null.

    A resumed run drops what the file says beyond `resume_step`, and a last line that was cut off, so that it
    goes on without a gap or a repeated step.
    """

    def __init__(self, path: Path, resume_step: int):
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= resume_step]
        if resume_step == 0:
            kept = []  # the run begins anew, with its first evaluation
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics, step: int) -> None:
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandbTracker:
    """Weights & Biases, also offline (WANDB_MODE=offline). The same run goes on after a resume."""

    def __init__(self, config: Mapping[str, object], project: str, name: str, folder: Path, run_id: str | None):
        try:
            import wandb
        except ImportError as error:
            raise UserError("logging.trackers: wandb is not installed. Run: pip install 'megatron_tf[wandb]'") from error
        self._run = wandb.init(
            project=project, name=name, dir=folder, id=run_id, resume="allow", config=dict(config)
        )
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")
        self.run_id: str = self._run.id

    def log(self, metrics: Metrics, step: int) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files; a resumed run takes back what was logged beyond `resume_step`."""

    def __init__(self, folder: Path, resume_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "logging.trackers: tensorboard is not installed. Run: pip install 'megatron_tf[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else None)

    def log(self, metrics: Metrics, step: int) -> None:
        for key, value in metrics.items():
            if value is not None:
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """Sends metrics to all trackers. One that raises is reported once through `warn` and left out from then on."""

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]):
        self._trackers, self._warn = list(trackers), warn

    @property
    def ids(self) -> dict[str, str]:
        """What a checkpoint keeps so that the same tracker run can go on."""
        return {"wandb": tracker.run_id for tracker in self._trackers if isinstance(tracker, WandbTracker)}

    def log(self, metrics: Metrics, step: int) -> None:
        self._each(lambda tracker: tracker.log(metrics, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:  # a tracker may fail in any way, and no way is worth a run
                self._trackers.remove(tracker)
                self._warn(f"{type(tracker).__name__} failed and is left out from now on: {error}")


def open_trackers(
    config: RunConfig, run_dir: Path, resume_step: int, ids: Mapping[str, str], is_main: bool, warn: Callable[[str], None]
) -> Trackers:
    """The run's trackers on the main rank, none on others. `ids`: as `Trackers.ids` of the checkpoint resumed from."""
    if not is_main:
        return Trackers([], warn)
    trackers: list[Tracker] = [JsonlTracker(run_dir / "metrics.jsonl", resume_step)]
    if "wandb" in config.logging.trackers:
        values = config.model_dump(mode="json", by_alias=True)
        trackers.append(WandbTracker(values, config.logging.project, config.run.name, run_dir, ids.get("wandb")))
    if "tensorboard" in config.logging.trackers:
        trackers.append(TensorBoardTracker(run_dir / "tensorboard", resume_step))
    return Trackers(trackers, warn)


def _complete_lines(path: Path) -> list[str]:
    """The lines of an earlier metrics.jsonl that are whole JSON objects with a step."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if "step" in json.loads(line):
                lines.append(line)
        except (ValueError, TypeError):
            continue
    return lines
