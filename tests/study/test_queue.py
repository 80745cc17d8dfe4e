"""The queue of a study: order, sharing with other workers, stops, changes of the study. Runs are tiny programs here."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from live import PATIENCE_SECONDS, until
from study_names import LOSSES, end, queue

from megatron_tf.durable import take_lock
from megatron_tf.errors import ConfigError, RunStopped, UserError
from megatron_tf.study import queue as module
from megatron_tf.study import result
from megatron_tf.study.hours import Speeds, total_seconds
from megatron_tf.study.plan import make_plan
from megatron_tf.study.queue import command
from megatron_tf.study.report import results_of, write_report
from megatron_tf.study.result import (
    check_unchanged,
    has_ended,
    loss_of,
    read_result,
    write_config,
    write_result,
)
from megatron_tf.study.tables import in_words


def test_all_runs_once_and_parents_first(study, started):
    names, of = started(), study()
    queue(of).run()
    assert sorted(names) == sorted(node.name for node in make_plan(of, loss_of).nodes)
    assert names.index("small/lr=0.02/seed1") < names.index("grown/seed1")
    assert set(names[:3]) == {f"small/lr={value}/seed1" for value in ("0.01", "0.02", "0.04")}
    del names[:]
    queue(of).run()
    assert names == []


def test_a_worker_leaves_alone_what_another_one_has(study, started):
    """Until that one is gone: then the run is its own."""
    names, of = started(), study()
    lines = []
    with queue(of)._claim(make_plan(of).nodes[0]) as claim:
        thread = threading.Thread(target=queue(of, workers=2, say=lines.append).run)
        thread.start()
        until(lambda: len(names) == 2, "the two other runs had ended")
        # ten more looks
        time.sleep(0.5)
        assert claim is not None and sorted(names) == ["small/lr=0.02/seed1", "small/lr=0.04/seed1"]
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive() and len(names) == 8
    # it is told once, and the runs of the two workers themselves are not
    held = [line for line in lines if "is being run by" in line]
    assert held == [f"small/lr=0.01/seed1: is being run by process {os.getpid()} on {socket.gethostname()}"]


def test_trials_that_end_while_the_plan_is_made(study, started, monkeypatch):
    """By another worker. The plan still waits for them, and the worker must not take that for the end."""
    names, of = started(), study()

    def slow(study, outcome):
        plan = make_plan(study, outcome)
        for node in plan.nodes:
            if node.waits is None and node.parent is None and not has_ended(node):
                write_result(node, module.measure(node))
        return plan

    monkeypatch.setattr(module, "make_plan", slow)
    queue(of, workers=1).run()
    assert len(names) == len(set(names)) == 8


def test_a_claim_lives_as_long_as_the_run(study, started, tmp_path):
    """The study may be killed: its run still trains, and must not be started a second time."""
    started()
    with queue(study())._claim(make_plan(study()).nodes[0]) as claim:
        child = os.fork()
        if child == 0:
            time.sleep(PATIENCE_SECONDS)
            os._exit(0)
        assert claim is not None
    with open(next((tmp_path / "study" / "claims").iterdir()), "a+") as file:
        assert not take_lock(file.fileno())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert take_lock(file.fileno())


def test_what_is_stopped_goes_on(study, started):
    """A signal is passed on to the runs, which save; the study is not over. A run that is not told would end well."""
    names, of = started("import time; time.sleep(60)"), study()
    lines = []

    def say(line):
        lines.append(line)
        if len(lines) == 2:
            mine._ask_to_stop()

    mine = queue(of, say=say)
    with pytest.raises(RunStopped, match="stopped: 0 of 8 runs have ended"):
        mine.run()
    assert names == []
    started()
    queue(of).run()
    assert all(has_ended(node) for node in make_plan(of, loss_of).nodes)


def test_report(study, started, tmp_path):
    started()
    of = study(more=[{"name": "longer", "parent": "small", "by": "branch", "flops": 4e7, "decay": 0.2,
                      "family": "static",
                      "comparable": False}], arms={"going_on": {"family": "static"}})  # fmt: skip
    with pytest.raises(UserError, match="no run has ended yet"):
        results_of(make_plan(of, loss_of))
    queue(of).run()
    plan = make_plan(of, loss_of)
    text = write_report(plan, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "loss.png",
        "report.md",
        "results.json",
        "sweeps.png",
        "table.txt",
    ]
    found = results_of(plan)
    small, on, grown, _ = found["arms"]
    assert found["reference"] == "going_on" and (found["runs_ended"], found["runs"]) == (10, 10)
    assert small["sweep"] == {
        "key": "optimizer.lr", "chosen": 0.02, "at_end_of_values": False, "losses": {"0.01": 3.0, "0.02": 2.1,
                                                                                     "0.04": 4.0}
    }  # fmt: skip
    assert on["loss"]["mean"] == pytest.approx(2.15) and "difference" not in on
    assert grown["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "verdict": "not significant"}
    assert grown["cost_against"]["static"]["ratio"] == pytest.approx(1.0, rel=0.1)
    assert "not significant" in text and "chosen 0.02." in text and "10 of 10 runs have ended" in text
    assert in_words(found) == text


def test_a_report_of_one_seed_while_its_sweep_runs(study):
    """The arm's run is then a guess, which is one of its trials as well, and may have ended as such."""
    of = study(seeds=[1])
    trials = [node for node in make_plan(of).nodes if node.is_trial]
    end(trials[1], math.nan)
    found = results_of(make_plan(of, loss_of))
    small = found["arms"][0]
    assert (small["ended"], small["diverged"], small["loss"], small["sweep"]["chosen"]) == (0, 0, None, None)
    assert (found["runs_ended"], found["runs"]) == (1, 5) and "the others have not ended" in in_words(found)


def test_a_run_that_is_another_one_now_is_refused(study, write, started):
    of = study()
    node = make_plan(of).nodes[0]
    node.folder.mkdir(parents=True)
    write_config(node, of.dir)
    check_unchanged(make_plan(of))
    changed = study(common={"optimizer": {"weight_decay": 0.3}})
    with pytest.raises(ConfigError, match=r"optimizer.weight_decay \(0.1 then, 0.3 now\)"):
        check_unchanged(make_plan(changed))
    names = started()
    with pytest.raises(UserError, match="was begun with another configuration"):
        queue(changed).run()
    assert names == []


def test_a_run_that_has_begun_may_go_on_in_another_layout(study, write):
    of = study()
    node = make_plan(of).nodes[0]
    node.folder.mkdir(parents=True)
    write_config(node, of.dir)
    common = {
        "parallel": {"engine": "torch", "tensor": 2},
        "training": {"micro_batch_size": 1, "activation_checkpointing": True},
        "checkpoint": {"interval_steps": 3},
        "logging": {"interval_steps": 3},
        "run": {"max_hours": 3.0},
    }
    check_unchanged(make_plan(study(ranks=2, common=common)))
    with pytest.raises(ConfigError, match=r"checkpoint.allow_data_change \(false then, true now\)"):
        check_unchanged(make_plan(study(common={"checkpoint": {"allow_data_change": True}})))


def test_arms_that_start_before_the_decay_of_a_run_that_has_begun(study):
    """One that is removed changes nothing; one that is added finds no state there."""
    both, alone = study(), study(arms={"going_on": None, "grown": {"at": "end"}}, reference=None)
    for first, second in ((both, alone), (alone, both)):
        node = make_plan(first).nodes[0]
        node.folder.mkdir(parents=True, exist_ok=True)
        write_config(node, first.dir)
        if first is both:
            check_unchanged(make_plan(second))
        else:
            with pytest.raises(ConfigError, match="has not kept its state before the decay.* Give that arm at: end"):
                check_unchanged(make_plan(second))


def test_a_study_that_was_moved_is_the_same(study, tmp_path, monkeypatch):
    """Its runs name their folders and their parents' as these lay, here relative to a working directory."""
    monkeypatch.chdir(tmp_path)
    plan = make_plan(study(dir="before"), lambda node: 2.0)
    for node in plan.nodes:
        node.folder.mkdir(parents=True)
        write_config(node, plan.study.dir)
    (tmp_path / "before").rename(tmp_path / "after")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = make_plan(study(dir=str(tmp_path / "after")), lambda node: 2.0)
    assert all(node.folder.is_dir() for node in moved.nodes)
    check_unchanged(moved)
    other = make_plan(study(dir=str(tmp_path / "after"), arms={"grown": {"at": "end"}}), lambda node: 2.0)
    with pytest.raises(ConfigError, match=r"growth.at \(before_decay then, end now\)"):
        check_unchanged(other)


def test_a_sweep_that_now_chooses_another_value_starts_nothing_from_it(study, started, monkeypatch):
    """What began under the old value and what would begin under the new one must not stand in one table."""
    names, of = started(), study()
    queue(of).run()
    del names[:]
    monkeypatch.setitem(LOSSES, "small/lr=0.03/seed1", 1.0)
    arms = {"small": {"sweep": {"key": "optimizer.lr", "values": [1e-2, 2e-2, 3e-2, 4e-2]}}}
    with pytest.raises(UserError, match=r"(?s)going_on.*optimizer.lr \(0.02 then, 0.03 now\).*grown"):
        queue(study(arms=arms)).run()
    assert names == ["small/lr=0.03/seed1"]


def test_a_result_that_is_none_is_refused(study, started):
    """Also one that has the fields, with values that no report can calculate with."""
    started()
    node = make_plan(study()).nodes[0]
    write_result(node, replace(module.measure(node), curve=((1, 2.0, 3.0),), metrics={"top1": 0.5, "other": math.nan}))
    whole = json.loads((node.folder / "result.json").read_bytes())
    assert whole["metrics"] == {"top1": 0.5, "other": None}
    kept = read_result(node)
    assert kept.curve == ((1, 2.0, 3.0),) and kept.metrics["top1"] == 0.5 and math.isnan(kept.metrics["other"])
    wrong = [
        *[{key: "1"} for key in whole if key not in ("name", "arm")],
        *[{key: None} for key in whole if key not in ("value", "loss")],
        *[{key: -1} for key in whole if key not in ("value", "loss", "name", "arm", "curve", "metrics")],
        *[{key: math.nan} for key in whole],
        {"tokens": 1.5}, {"seed": True}, {"loss": 10**400}, {"curve": [[1, 2]]},
        {"curve": [[1, 2, None]]}, {"curve": [[-1, 2, 3]]}, {"metrics": {"top1": "a"}}, {"hours": 1},
    ]  # fmt: skip
    others = [json.dumps(whole | other).encode() for other in wrong]
    for content in (b"", b"[]", b'{"curve": []}', b'{"loss": 1}', b"\x89PNG", b"[" * 100_000, *others):
        (node.folder / "result.json").write_bytes(content)
        with pytest.raises(UserError, match="is not the result of a run"):
            read_result(node)


def test_a_result_without_the_metrics_of_its_task_is_refused(study, started, monkeypatch):
    """Beside one that has them, it ended the report with a traceback."""
    started()
    node = make_plan(study()).nodes[0]
    write_result(node, replace(module.measure(node), metrics={"top1": 0.5}))
    monkeypatch.setattr(result, "task_of", lambda model: SimpleNamespace(metrics=("top1",)))
    assert read_result(node).metrics == {"top1": 0.5}
    monkeypatch.setattr(result, "task_of", lambda model: SimpleNamespace(metrics=("top1", "top5")))
    with pytest.raises(UserError, match="result.json: is not the result of a run. Delete it: the study then measures"):
        read_result(node)


def test_time(study):
    """Three trials of 10 s, then the second seed, then two branches and two growths: two at a time, and one."""
    plan = make_plan(study())
    assert total_seconds(plan, 1, lambda node: 10.0) == 80
    assert total_seconds(plan, 2, lambda node: 10.0) == 50
    assert total_seconds(plan, 2, Speeds({}).seconds) is None
    assert total_seconds(plan, 1, Speeds({}, 1e6).seconds) == pytest.approx(
        sum(node.own_flops for node in plan.nodes) / 1e6
    )


def test_command(tmp_path):
    one, four = command(tmp_path, 1), command(tmp_path, 4)
    assert one[1:4] == ["-m", "megatron_tf", "train"]
    assert four[1:6] == ["-m", "megatron_tf.study.launch", "--standalone", "--nproc-per-node", "4"]
