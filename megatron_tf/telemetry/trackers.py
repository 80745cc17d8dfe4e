"""The logs of a run's numbers: metrics.jsonl always, wandb and TensorBoard if the configuration names them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from megatron_tf.durable import atomic_path, open_plain
from megatron_tf.errors import NOT_AS_WRITTEN, UserError, write_errors
from megatron_tf.streams import without_terminal
from megatron_tf.telemetry.line_file import LineFile
from megatron_tf.telemetry.records import RECORDS_NAME

Value = float | int | str | None


class Described(Protocol):
    """The description of a run in its configuration."""

    @property
    def name(self) -> str: ...

    @property
    def tags(self) -> Sequence[str]: ...

    @property
    def notes(self) -> str: ...


class Tracking(Protocol):
    """The trackers that a configuration names, and the project there."""

    @property
    def trackers(self) -> Sequence[str]: ...

    @property
    def project(self) -> str: ...


class Tracked(Protocol):
    """The configuration of a run, of pretraining or of fine-tuning."""

    @property
    def run(self) -> Described: ...

    @property
    def logging(self) -> Tracking: ...

    def model_dump(self, *, mode: str, by_alias: bool) -> dict[str, Any]: ...


class Tracker(Protocol):
    def log(self, metrics: Mapping[str, Value], step: int) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """One JSON object a line, "step" first; NaN and infinity, which JSON has no form for, are null.

    Records of an earlier process after the checkpoint at `resume_step` are dropped, because those steps are done again;
    so is a line that a kill tore. A run that starts at step 0 starts an empty file; the records of an earlier run in
    the folder are kept as metrics.jsonl.1 and so on. UserError when the file cannot be written at the start. Later, a
    full disk loses records until there is room again, which is reported through `warn`.
    """

    def __init__(self, path: Path, resume_step: int, warn: Callable[[str], None]):
        path = Path(os.path.realpath(path))  # writes the target of a link, instead of replacing the link by a file
        with write_errors(UserError, path, "Choose another run.dir."):
            path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step == 0 and _has_steps(path):
                kept = next(other for n in count(1) if not (other := path.with_name(f"{path.name}.{n}")).exists())
                os.rename(path, kept)
                warn(f"{path}: is of an earlier run, and this one starts at step 0. It is kept as {kept.name}.")
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                file.writelines(_lines_until(path, resume_step))
        self._file = LineFile(path, warn)

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        record = {"step": step, **{key: _finite_or_none(value) for key, value in metrics.items()}}
        self._file.append(json.dumps(record, allow_nan=False))

    def close(self) -> None:
        """Nothing is held open."""


class WandbTracker:
    """A wandb run, drawn over tokens. With `run_id` that run goes on, unless WANDB_RUN_ID names another one.

    UserError when wandb is not installed.
    """

    def __init__(self, config: Mapping[str, Any], project: str, run: Described, dir: Path, run_id: str | None):
        try:
            import wandb
        except ImportError as error:
            raise UserError(_missing("wandb")) from error
        self._dir = dir
        with without_terminal():  # at one, wandb would ask for an account, and wait
            self._run = wandb.init(
                config=dict(config),
                project=project,
                name=run.name,
                tags=list(run.tags),
                notes=run.notes,
                dir=str(dir),
                id=os.environ.get("WANDB_RUN_ID") or run_id,
                resume="allow",
            )
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    @property
    def run_id(self) -> str:
        return self._run.id

    @property
    def place(self) -> str:
        """Address of the run; without a network, the command that sends it later."""
        return self._run.url or f"wandb sync {self._dir / 'wandb'}"

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        # Not `log(step=step)`: wandb throws away whatever is at or before a step it has seen, which the steps after
        # the checkpoint of a resumed run are.
        self._run.log({"step": step, **{key: value for key, value in metrics.items() if value is not None}})

    def close(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files, drawn over steps. UserError when tensorboard is not installed."""

    def __init__(self, dir: Path, resume_step: int, about: str = ""):
        """`about`: a text on the run, shown with its curves."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(_missing("tensorboard")) from error
        # purge_step hides the records of earlier processes from this step on
        self._writer = SummaryWriter(str(dir), purge_step=resume_step + 1 if resume_step else 0)
        self.place = f"tensorboard --logdir {dir}"
        if about:
            self._writer.add_text("run", about, resume_step)

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        for key, value in metrics.items():
            if isinstance(value, str):
                self._writer.add_text(key, value, step)
            elif value is not None:
                self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """Passes everything on to each of `trackers`. One that raises is reported once and dropped; training goes on.

    `ids`: names of runs at the trackers, {"wandb": "1a2b3c"}, kept in checkpoints so that a resumed run goes on there.
    `places`: where a person finds the run: an address, or a command to type.
    """

    def __init__(
        self,
        trackers: Sequence[Tracker],
        warn: Callable[[str], None],
        ids: Mapping[str, str] | None = None,
        places: Sequence[str] = (),
    ):
        self._trackers = list(trackers)
        self._warn = warn
        self._ids = dict(ids or {})
        self.places = tuple(places)

    @property
    def ids(self) -> dict[str, str]:
        return dict(self._ids)

    def log(self, metrics: Mapping[str, Value], step: int) -> None:
        self._each(lambda tracker: tracker.log(metrics, step), "is dropped; the run goes on without it")

    def close(self) -> None:
        """Closes all trackers, once."""
        self._each(lambda tracker: tracker.close(), "was not closed; its last records may be missing")
        self._trackers = []

    def _each(self, act: Callable[[Tracker], None], consequence: str) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:  # whatever a third-party service throws
                self._trackers.remove(tracker)
                self._warn(f"{type(tracker).__name__} {consequence}: {_reason(error)}")


def open_trackers(
    config: Tracked,
    run_dir: Path,
    resume_step: int,
    ids: Mapping[str, str],
    is_main: bool,
    warn: Callable[[str], None],
) -> Trackers:
    """The trackers of a run that goes on at `resume_step`: metrics.jsonl and what `logging.trackers` names.

    Other ranks than the main one get none. `ids`: what `Trackers.ids` was when the checkpoint was saved. A service
    that cannot be reached is reported through `warn` and left out. UserError when a package is missing or
    metrics.jsonl cannot be written.
    """
    if not is_main:
        return Trackers([], warn, ids)
    ids = dict(ids)
    trackers: list[Tracker] = [JsonlTracker(run_dir / RECORDS_NAME, resume_step, warn)]
    places = []
    for name in config.logging.trackers:
        try:
            if name == "wandb":
                values = config.model_dump(mode="json", by_alias=True)
                wandb = _open_wandb(values, config.logging.project, config.run, run_dir, ids.get(name), warn)
                ids[name] = wandb.run_id
                trackers.append(wandb)
                places.append(wandb.place)
            else:
                board = TensorBoardTracker(run_dir / "tensorboard", resume_step, _about(config.run))
                trackers.append(board)
                places.append(board.place)
        except UserError:
            raise
        except Exception as error:  # no network, no account, no disk
            warn(f"{name} does not start; the run goes on without it: {_reason(error)}")
    return Trackers(trackers, warn, ids, places)


def _about(run: Described) -> str:
    """Name, tags and notes as a text; "" without tags and notes."""
    return "\n\n".join(filter(None, (run.name, ", ".join(run.tags), run.notes))) if run.tags or run.notes else ""


def _open_wandb(
    config: Mapping[str, Any], project: str, run: Described, dir: Path, run_id: str | None, warn: Callable[[str], None]
) -> WandbTracker:
    try:
        return WandbTracker(config, project, run, dir, run_id)
    except Exception as error:
        # The service never gives the id of a run that was deleted again.
        if run_id is None or "deleted" not in str(error):
            raise
        warn(f"wandb: run {run_id} was deleted there; a new one begins")
    return WandbTracker(config, project, run, dir, None)


def _has_steps(path: Path) -> bool:
    """Whether `path` has records after step 0, and not only those of a start that did no step."""
    if not path.exists():
        return False
    with open(path, "rb") as file:
        return any((step := _step_of(line)) is not None and step > 0 for line in file)


def _step_of(line: bytes) -> int | None:
    """The step of a record; None for what is torn, or no record."""
    try:
        step = json.loads(line)["step"]
    except NOT_AS_WRITTEN:
        return None
    return step if isinstance(step, int) and line.endswith(b"\n") else None


def _lines_until(path: Path, resume_step: int) -> Iterator[bytes]:
    """The lines of `path` up to `resume_step` without those that are torn; none when there is no file yet."""
    if not os.path.lexists(path):
        return
    with open_plain(path) as file:
        for line in file:
            step = _step_of(line)
            # A checkpoint at step 0 does not exist: a run at step 0 is a new one, also when the file is not.
            if step is not None and step <= resume_step and resume_step > 0:
                yield line


def _finite_or_none(value: Value) -> Value:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _missing(extra: str) -> str:
    return (
        f"logging.trackers: {extra} is named but not installed. "
        f"Install it with `pip install 'megatron_tf[{extra}]'`, or take it out of logging.trackers."
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
