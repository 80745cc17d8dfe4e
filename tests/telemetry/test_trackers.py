from __future__ import annotations

import errno
import json
import os
import sys
from types import SimpleNamespace

import pytest

from megatron_tf.config.schema import Run
from megatron_tf.errors import UserError
from megatron_tf.telemetry.trackers import (
    JsonlTracker,
    TensorBoardTracker,
    Trackers,
    WandbTracker,
    open_trackers,
)

RUN = Run(dir="unused", name="name", tags=("growth", "try"), notes="half of the tokens")
NAN, INF = float("nan"), float("inf")


def records(path) -> list[dict]:
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(path, steps, resume_step=0):
    tracker = JsonlTracker(path, resume_step, pytest.fail)
    for step in steps:
        tracker.log({"tokens": 10 * step, "train/loss": 1.0 / step}, step)
    tracker.close()


def test_jsonl_is_one_strict_object_a_step(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonlTracker(path, 0, pytest.fail)
    tracker.log({"tokens": 7, "train/loss": NAN, "optim/grad_norm": INF, "perf/mfu": None, "optim/lr": -INF}, 1)
    assert records(path) == [  # readable while the run goes on
        {"step": 1, "tokens": 7, "train/loss": None, "optim/grad_norm": None, "perf/mfu": None, "optim/lr": None}
    ]
    tracker.close()


def test_a_resumed_file_has_neither_gap_nor_repeat(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 8))
    write_steps(path, range(5, 11), resume_step=4)
    assert [record["step"] for record in records(path)] == list(range(1, 11))
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_torn_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    path.write_text(path.read_text() + '{"step": 3, "tra')
    write_steps(path, [4], resume_step=3)
    assert [record["step"] for record in records(path)] == [1, 2, 3, 4]
    path.write_text(path.read_text() + '{"step": 4}')  # a whole object, but its line is not
    write_steps(path, [5], resume_step=4)
    assert [record["step"] for record in records(path)] == [1, 2, 3, 4, 5]


def test_a_run_from_step_0_starts_the_file_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    JsonlTracker(path, 0, pytest.fail).log({"eval/loss": 9.0}, 0)
    write_steps(path, [1], resume_step=0)
    assert [record["step"] for record in records(path)] == [1]


def test_what_an_earlier_run_logged_is_kept(tmp_path):
    path, warnings = tmp_path / "metrics.jsonl", []
    for run in (1, 2, 3):
        tracker = JsonlTracker(path, 0, warnings.append)
        tracker.log({"train/loss": float(run)}, 5)
    assert [record["train/loss"] for name in ("", ".1",
                                              ".2") for record in records(tmp_path / f"metrics.jsonl{name}")] == [
        3.0, 1.0, 2.0
    ]  # fmt: skip
    assert len(warnings) == 2 and warnings[1].endswith("this one starts at step 0. It is kept as metrics.jsonl.2.")


def test_a_crash_while_the_file_is_cut_leaves_it_whole(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    before = path.read_bytes()

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        JsonlTracker(path, 1, pytest.fail)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "No space left on device. Free space there, or choose another run.dir."),
        (errno.EACCES, "Permission denied. Correct the permissions, or choose another run.dir."),
        (errno.EROFS, "Read-only file system. Mount the file system writable, or choose another run.dir."),
    ],
)
def test_metrics_that_cannot_be_written_at_the_start(tmp_path, monkeypatch, older, number, remedy):
    path = tmp_path / "metrics.jsonl"
    if older:
        write_steps(path, range(1, 4))

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=rf"metrics\.jsonl: {remedy}"):
        JsonlTracker(path, 3, pytest.fail)
    assert os.listdir(tmp_path) == (["metrics.jsonl"] if older else [])  # nothing half-written


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"/file: File exists\. Choose another run\.dir"):
        JsonlTracker(tmp_path / "file" / "metrics.jsonl", 0, pytest.fail)


class Recorder:
    def __init__(self, broken: bool = False):
        self.logged, self.closed, self.broken = [], 0, broken

    def log(self, metrics, step):
        if self.broken:
            raise ConnectionError("no network")
        self.logged.append((step, dict(metrics)))

    def close(self):
        if self.broken:
            raise ConnectionError("no network")
        self.closed += 1


def test_a_failing_tracker_is_reported_once_and_stops_nothing():
    warnings, good, late = [], Recorder(), Recorder()
    trackers = Trackers([Recorder(broken=True), good, late], warnings.append)
    for step in (1, 2):
        trackers.log({"train/loss": 2.0}, step)
    late.broken = True
    trackers.close()
    trackers.close()
    assert good.logged == [(1, {"train/loss": 2.0}), (2, {"train/loss": 2.0})]
    assert good.closed == 1
    assert len(warnings) == 2
    assert "Recorder is dropped" in warnings[0]
    assert "ConnectionError: no network" in warnings[0]
    assert "was not closed" in warnings[1]


def test_metrics_that_cannot_be_written_for_a_while_have_a_gap_of_that_while(tmp_path):
    path, warnings = tmp_path / "run" / "metrics.jsonl", []
    trackers = Trackers([JsonlTracker(path, 0, warnings.append)], warnings.append)
    for step in range(1, 7):
        if step == 3:
            path.parent.rename(tmp_path / "away")
        if step == 5:
            (tmp_path / "away").rename(path.parent)
        trackers.log({"train/loss": 2.0}, step)
    trackers.close()
    assert [record["step"] for record in records(path)] == [1, 2, 5, 6]
    assert len(warnings) == 1
    assert "metrics.jsonl: No such file or directory. Its lines are lost until it can be written" in warnings[0]


class FakeRun:
    def __init__(self, id):
        self.id, self.defined, self.logged, self.finished = id, [], [], False
        self.url = f"https://wandb.ai/me/project/runs/{id}"

    def define_metric(self, name, step_metric=None):
        self.defined.append((name, step_metric))

    def log(self, metrics):
        self.logged.append(metrics)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    fake = SimpleNamespace(runs=[], arguments=[])

    def init(**arguments):
        fake.arguments.append(arguments)
        fake.runs.append(FakeRun(arguments["id"] or "new"))
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_goes_on_with_the_same_run_over_tokens(wandb, tmp_path):
    first = WandbTracker({"run": {"seed": 1}}, "project", RUN, tmp_path, None)
    assert first.run_id == "new"
    second = WandbTracker({}, "project", RUN, tmp_path, first.run_id)
    second.log({"tokens": 70, "train/loss": 2.0, "perf/mfu": None}, 7)
    second.close()
    assert [arguments["id"] for arguments in wandb.arguments] == [None, "new"]
    assert [arguments["resume"] for arguments in wandb.arguments] == ["allow", "allow"]
    run = wandb.runs[1]
    assert run.defined == [("tokens", None), ("*", "tokens")]
    assert run.logged == [{"step": 7, "tokens": 70, "train/loss": 2.0}]
    assert run.finished


def test_tags_notes_and_places(wandb, tmp_path):
    opened = open_trackers(config("wandb", "tensorboard"), tmp_path, 0, {}, True, pytest.fail)
    assert opened.places == ("https://wandb.ai/me/project/runs/new", f"tensorboard --logdir {tmp_path}/tensorboard")
    (arguments,) = wandb.arguments
    assert (arguments["tags"], arguments["notes"]) == (["growth", "try"], "half of the tokens")
    opened.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    (about,) = board.Tensors("run/text_summary")
    assert about.tensor_proto.string_val == [b"name\n\ngrowth, try\n\nhalf of the tokens"]
    tracker = WandbTracker({}, "project", RUN, tmp_path, None)
    tracker._run.url = None
    assert tracker.place == f"wandb sync {tmp_path}/wandb"
    assert open_trackers(config("wandb"), tmp_path, 0, {}, False, pytest.fail).places == ()


def test_a_run_that_was_deleted_is_begun_anew(wandb, tmp_path):
    begin, warnings = wandb.init, []

    def init(**arguments):
        if arguments["id"] == "1a2b":
            raise RuntimeError("run me/project/1a2b was previously created and deleted; try a new run name")
        return begin(**arguments)

    wandb.init = init
    trackers = open_trackers(config("wandb"), tmp_path, 0, {"wandb": "1a2b"}, True, warnings.append)
    assert trackers.ids == {"wandb": "new"}
    assert warnings == ["wandb: run 1a2b was deleted there; a new one begins"]


def test_the_run_that_the_environment_names_goes_on(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert open_trackers(config("wandb"), tmp_path, 0, {"wandb": "1a2b"}, True, pytest.fail).ids == {"wandb": "mine"}


def test_nothing_can_be_asked_while_wandb_starts(wandb, tmp_path, monkeypatch):
    begin, seen = wandb.init, []

    def init(**arguments):
        seen.append((sys.stdin.isatty(), sys.stdin.read()))
        return begin(**arguments)

    wandb.init = init
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    WandbTracker({}, "project", RUN, tmp_path, None)
    assert seen == [(False, "")] and sys.stdin.isatty()


def config(*trackers):
    return SimpleNamespace(
        logging=SimpleNamespace(trackers=trackers, project="project"),
        run=RUN,
        model_dump=lambda **_: {"run": {"name": "name"}},
    )


def test_only_the_main_rank_tracks_but_all_know_the_ids(wandb, tmp_path):
    ids = {"wandb": "1a2b"}
    other = open_trackers(config("wandb"), tmp_path, 0, ids, is_main=False, warn=pytest.fail)
    other.log({"train/loss": 1.0}, 1)
    assert (other.ids, os.listdir(tmp_path), wandb.runs) == (ids, [], [])
    main = open_trackers(config("wandb"), tmp_path, 0, ids, is_main=True, warn=pytest.fail)
    assert (main.ids, wandb.runs[0].id) == (ids, "1a2b")


def test_ids_survive_a_run_without_that_tracker(tmp_path):
    assert open_trackers(config(), tmp_path, 0, {"wandb": "1a2b"}, True, pytest.fail).ids == {"wandb": "1a2b"}


def test_a_service_that_does_not_start_is_left_out(wandb, tmp_path):
    def unreachable(**_):
        raise ConnectionError("no network")

    wandb.init, warnings = unreachable, []
    trackers = open_trackers(config("wandb"), tmp_path, 0, {}, True, warnings.append)
    trackers.log({"train/loss": 1.0}, 1)
    assert (len(warnings), trackers.ids) == (1, {})
    assert "wandb does not start; the run goes on without it: ConnectionError: no network" in warnings[0]
    assert len(records(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_names_the_extra(name, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"logging\.trackers: {name} is named .*megatron_tf\[{name}\]"):
        open_trackers(config(name), tmp_path, 0, {}, True, pytest.fail)


@pytest.mark.slow
def test_real_wandb_offline(tmp_path, monkeypatch):
    """Against the real package: the calls above are still its interface."""
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = WandbTracker({"run": {"seed": 1}}, "project", RUN, tmp_path, "1a2b3c4d")
    assert tracker.run_id == "1a2b3c4d"
    tracker.log({"tokens": 10, "train/loss": 2.0, "perf/mfu": None}, 1)
    tracker.close()
    assert list(tmp_path.glob("wandb/offline-run-*-1a2b3c4d/*.wandb"))


@pytest.mark.slow
def test_real_tensorboard_takes_back_what_is_trained_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TensorBoardTracker(tmp_path, 0)
    for step in range(1, 6):
        first.log({"train/loss": float(step), "perf/mfu": None}, step)
    first.close()
    resumed = TensorBoardTracker(tmp_path, 3)
    resumed.log({"train/loss": 40.0}, 4)
    resumed.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert events.Tags()["scalars"] == ["train/loss"]
