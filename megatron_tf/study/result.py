"""The result of a run of a study: a small file in its folder. The run has ended when the file exists."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, WrapValidator, with_config

from megatron_tf.checkpoint.manager import resolve
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.config.fields import NonNegative
from megatron_tf.config.load import dump_config, load_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.tasks import task_of
from megatron_tf.diagnosis.run_facts import settings
from megatron_tf.durable import write_atomically
from megatron_tf.errors import NOT_AS_WRITTEN, ConfigError, UserError, file_errors, write_errors
from megatron_tf.study.plan import Node, Plan
from megatron_tf.telemetry.records import DIVERGED, RECORDS_NAME, read_records

RESULT_NAME = "result.json"
# Beginnings of the keys that say how a run is computed and not what: another machine may need other values.
_MAY_CHANGE = (
    "run.name", "parallel.", "zero.", "logging.", "checkpoint.interval_steps", "checkpoint.keep_last",
    "checkpoint.asynchronous", "checkpoint.on_failure", "training.micro_batch_size",
    "training.activation_checkpointing", "training.compile", "training.norm", "training.scores", "training.profile",
    "data.workers", "run.max_hours", "run.hang_seconds", "run.tags", "run.notes",
    "training.stop_when",  # only to null: arms with it are refused
)  # fmt: skip
_KEPT = "checkpoint.keep_before_decay"  # set by the plan for arms that others start from

Whole = Annotated[int, Field(ge=0, lt=2**60)]
Finite = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]
# NaN and infinity are written as null, because JSON has neither.
Logged = Annotated[Finite, WrapValidator(lambda value, check: math.nan if value is None else check(value))]


@dataclass(frozen=True)
class Result:
    """`tokens` and `flops` include the parents; `own_tokens` and `own_flops` do not.

    `loss`: on the validation data, at the end; NaN when the run, or the one that it starts from, has diverged.
    `seconds`: of its own training steps.  `tokens_per_second`: 0 when none was logged.  `state_bytes`: size of the last
    checkpoint; 0 after divergence.  `curve`: [tokens, FLOPs, validation loss] of each evaluation.  `metrics`: of the
    task, such as "top1", on the validation data at the end.
    """

    name: str
    arm: str
    seed: Whole
    value: Finite | None
    loss: Logged
    tokens: Whole
    flops: NonNegative
    own_tokens: Whole
    own_flops: NonNegative
    seconds: NonNegative
    tokens_per_second: NonNegative
    parameters: Whole
    state_bytes: Whole
    curve: tuple[tuple[Whole, NonNegative, Finite], ...]
    metrics: Mapping[str, Logged] = field(default_factory=dict)


# Reads a result by the rule of each field. A field that is unknown is refused, and so is text in place of a number.
_RESULT = TypeAdapter(with_config(ConfigDict(strict=True, extra="forbid"))(Result))


def measure(node: Node) -> Result:
    """The result of a run whose training has just ended. UserError when it has not logged a validation loss."""
    records = read_records(node.folder)
    if DIVERGED in records[-1]:
        return of_diverged(node, records)
    evaluated = [record for record in records if "eval/loss" in record]
    if not evaluated or evaluated[-1]["step"] != records[-1]["step"]:
        raise UserError(
            f"{node.folder}: has no validation loss of its last step. Move the folder away and run it again."
        )
    reader = open_checkpoint(resolve(node.folder))
    return Result(
        name=node.name,
        arm=node.arm.name,
        seed=node.seed,
        value=node.value,
        loss=_number(evaluated[-1]["eval/loss"]),
        tokens=evaluated[-1]["tokens"],
        flops=evaluated[-1]["flops"],
        own_tokens=evaluated[-1]["tokens"] - node.begin.tokens,
        own_flops=evaluated[-1]["flops"] - node.begin.flops,
        seconds=_seconds(records, node.begin.step),
        tokens_per_second=_speed(records),
        parameters=node.parameters,
        state_bytes=sum(file.num_bytes for file in reader.manifest.files.values()),
        curve=_curve(records),
        metrics={name: _number(evaluated[-1][f"eval/{name}"]) for name in task_of(node.config.model).metrics},
    )


def has_diverged(node: Node) -> bool:
    """Whether the run's training has ended by diverging."""
    if not (node.folder / RECORDS_NAME).is_file():
        return False
    records = read_records(node.folder)
    return bool(records) and DIVERGED in records[-1]


def of_diverged(node: Node, records: Sequence[dict[str, Any]] = ()) -> Result:
    """The result of a run that has diverged after `records`; without any, of one whose parent has."""
    begin = node.begin
    tokens, flops = (records[-1]["tokens"], records[-1]["flops"]) if records else (begin.tokens, begin.flops)
    return Result(
        name=node.name,
        arm=node.arm.name,
        seed=node.seed,
        value=node.value,
        loss=math.nan,
        tokens=tokens,
        flops=flops,
        own_tokens=tokens - begin.tokens,
        own_flops=flops - begin.flops,
        seconds=_seconds(records, begin.step),
        tokens_per_second=_speed(records),
        parameters=node.parameters,
        state_bytes=0,
        curve=_curve(records),
        metrics=dict.fromkeys(task_of(node.config.model).metrics, math.nan),
    )


def _speed(records: Sequence[dict[str, Any]]) -> float:
    speeds = [record["perf/tokens_per_second"] for record in records if "perf/step_seconds" in record]
    return statistics.median(speeds) if speeds else 0.0


def _curve(records: Sequence[dict[str, Any]]) -> tuple[tuple[int, float, float], ...]:
    return tuple((r["tokens"], r["flops"], r["eval/loss"]) for r in records if r.get("eval/loss") is not None)


def _number(logged: float | None) -> float:
    return math.nan if logged is None else float(logged)


def _seconds(records: Sequence[dict[str, Any]], first: int) -> float:
    """Of the steps from `first` on. A step that was done again after an interruption counts once."""
    by_step = {record["step"]: record["perf/step_seconds"] for record in records if "perf/step_seconds" in record}
    total, before = 0.0, first
    for step in sorted(by_step):
        total += (step - before) * by_step[step]
        before = step
    return total


def write_result(node: Node, result: Result) -> None:
    with write_errors(UserError, node.folder, "Choose another dir."):
        write_atomically(node.folder / RESULT_NAME, (json.dumps(in_json(result), indent=1) + "\n").encode())


def in_json(result: Result) -> dict[str, Any]:
    """Ready for JSON, see `Logged`."""
    metrics = {name: _finite_or_none(value) for name, value in result.metrics.items()}
    return {**asdict(result), "loss": _finite_or_none(result.loss), "metrics": metrics}


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def has_ended(node: Node) -> bool:
    return (node.folder / RESULT_NAME).is_file()


def read_result(node: Node) -> Result | None:
    """None for a run that has not ended. UserError when the file cannot be read or is not a result."""
    path = node.folder / RESULT_NAME
    if not path.is_file():
        return None
    with file_errors(UserError, path, "Make it readable."):
        content = path.read_bytes()
    try:
        result = _RESULT.validate_json(content)
        for name in task_of(node.config.model).metrics:
            result.metrics[name]  # tables compare those of all runs: one that lacks some is measured anew
    except NOT_AS_WRITTEN:
        raise UserError(
            f"{path}: is not the result of a run. Delete it: the study then measures the run anew."
        ) from None
    return result


def loss_of(node: Node) -> float | None:
    """An `Outcome`."""
    result = read_result(node)
    return None if result is None else result.loss


def config_file(node: Node, study_dir: str) -> Path:
    """The file with the configuration that a run is started with."""
    return Path(study_dir, "configs", f"{node.name.replace('/', '_')}.yml")


def failure_file(node: Node, study_dir: str) -> Path:
    """The file that exists after a run has failed, until it starts again. It holds the reason."""
    return Path(study_dir, "failed", node.name.replace("/", "_"))


def failure_times(study_dir: str) -> dict[str, int]:
    """When each of the runs that have failed did so, by the name of its `failure_file`."""
    names: Sequence[str] = ()
    with suppress(FileNotFoundError):
        names = os.listdir(Path(study_dir, "failed"))
    times = {name: failure_time(Path(study_dir, "failed", name)) for name in names}
    return {name: time for name, time in times.items() if time is not None}


def failure_time(failure: Path) -> int | None:
    """When a run has failed, by its `failure_file`; None when there is no such file."""
    with suppress(FileNotFoundError):
        return failure.stat().st_mtime_ns
    return None


def reason_of(failure: Path) -> str | None:
    """The reason in a `failure_file`; None when there is no such file."""
    with suppress(FileNotFoundError):
        return failure.read_text("utf-8").strip()
    return None


def has_failed(node: Node, study_dir: str) -> bool:
    return failure_file(node, study_dir).is_file()


def write_failure(node: Node, study_dir: str, reason: str) -> None:
    path = failure_file(node, study_dir)
    with write_errors(UserError, path, "Choose another dir."):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, f"{reason}\n".encode())


def begin_again(node: Node, study_dir: str) -> Path | None:
    """Removes the mark of failure of a run that starts again. If its configuration has changed, its folder is moved
    away, so that it does not resume from the old one; returns the new path of that folder, else None."""
    if not has_failed(node, study_dir):
        return None
    kept = None
    if _differing(node, study_dir):
        kept = next(path for n in itertools.count(1) if not (path := Path(f"{node.folder}.failed{n}")).exists())
        with file_errors(UserError, node.folder, "Move the folder away."):
            node.folder.rename(kept)
    failure_file(node, study_dir).unlink()
    return kept


def write_config(node: Node, study_dir: str) -> Path:
    path = config_file(node, study_dir)
    with write_errors(UserError, path, "Choose another dir."):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, dump_config(node.config).encode())
    return path


def check_unchanged(plan: Plan) -> None:
    """ConfigError with the keys that differ when a run has begun with another configuration than the file gives now.

    Keys that say how a run is computed, such as its layout, may differ: runs resume in any.
    """
    known = (node for node in plan.nodes if node.waits is None)
    if problems := [problem for node in known if (problem := changed(node, plan.study.dir)) is not None]:
        raise ConfigError(problems)


def changed(node: Node, study_dir: str) -> str | None:
    """The error message when a run has begun with another configuration than it would have now. None when nothing
    differs, and for a run that has failed: its configuration may be corrected."""
    if has_failed(node, study_dir) and not has_ended(node):
        return None
    differing = _differing(node, study_dir)
    if not differing:
        return None
    if [key for key, *_ in differing] == [_KEPT]:
        return (
            f"{node.folder}: has not kept its state before the decay, from which another arm is to start. Give that "
            "arm at: end, or move the folder away to train it again."
        )
    told = ", ".join(f"{key} ({before} then, {now} now)" for key, before, now in differing[:4])
    more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
    return (
        f"{node.folder}: was begun with another configuration: {told}{more}. Restore it, move the folder away, or "
        "choose another dir."
    )


def _differing(node: Node, study_dir: str) -> list[tuple[str, str | None, str | None]]:
    """(key, value that the run has begun with, value now) of each key that differs; empty if it has not begun."""
    path = config_file(node, study_dir)
    if not node.folder.exists() or not path.exists():
        return []
    before, now = _settings(load_config(path), node.name), _settings(node.config, node.name)
    return [
        (key, before.get(key), now.get(key))
        for key in {**before, **now}
        if before.get(key) != now.get(key)
        and not key.startswith(_MAY_CHANGE)
        # No arm starts there any more.
        and (key, now.get(key)) != (_KEPT, "false")
    ]


def _settings(config: RunConfig, name: str) -> dict[str, str]:
    """Of the run `name`. Paths are relative to the study's folder, because that may have been moved since."""
    found = settings(config)
    own = found.pop("run.dir")
    study_dir = os.path.abspath(own.removesuffix(os.path.join("runs", name)))
    for key in ("branch.from", "growth.from"):
        if key in found:
            found[key] = os.path.relpath(found[key], study_dir)
    return found
