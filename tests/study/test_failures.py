"""Runs of a study that fail or diverge: what is told, what still runs, what may be tried again."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from live import PATIENCE_SECONDS
from study_names import BIGGER, LOSSES, queue

from megatron_tf.config.extends import merged
from megatron_tf.errors import ConfigError, UserError
from megatron_tf.study import queue as module
from megatron_tf.study import result
from megatron_tf.study.hours import Speeds, total_seconds
from megatron_tf.study.plan import make_plan
from megatron_tf.study.report import results_of, write_report
from megatron_tf.study.result import (
    check_unchanged,
    failure_file,
    failure_time,
    failure_times,
    has_failed,
    loss_of,
    measure,
    read_result,
    write_failure,
    write_result,
)
from megatron_tf.study.tables import in_words

DIVERGES = """
import json, pathlib, re, sys
text = pathlib.Path(sys.argv[1]).read_text()
folder = pathlib.Path(re.search(r"  dir: (.*)", text)[1])
folder.mkdir(parents=True, exist_ok=True)
record = {"step": 20, "tokens": 1280, "flops": 1.2e7, "train/diverged": 1}
(folder / "metrics.jsonl").write_text(json.dumps(record) + chr(10))
sys.exit(2 if "lr=0.04" in str(folder) or "going_on" in str(folder) else 0)
"""


def test_what_fails_is_named_and_all_else_runs(study, started):
    names, lines = started("import sys; sys.exit(2 if 'going_on_seed1' in sys.argv[1] else 0)"), []
    of = study()
    with pytest.raises(
        UserError, match="1 of the runs failed:\n  - going_on/seed1: exit code 2, see .*going_on_seed1.log"
    ):
        queue(of, say=lines.append).run()
    assert len(names) == 7 and any("failed with exit code 2" in line for line in lines)


def test_what_fails_here_and_ends_elsewhere_has_not_failed(study, started, monkeypatch):
    """Another process takes the run as soon as it has failed here, perhaps on a machine without a fault."""
    names, of = started("import sys; sys.exit(1 if 'going_on_seed1' in sys.argv[1] else 0)"), study()

    def repeated(node, *arguments):
        result.write_failure(node, *arguments)
        write_result(node, module.measure(node))

    monkeypatch.setattr(module, "write_failure", repeated)
    queue(of).run()
    assert len(names) == len(set(names)) == 8


def test_a_run_that_diverges_is_a_result(study, started, monkeypatch, tmp_path):
    """A trial that does is the worst of its sweep; an arm's seed that does is told, and left out of means."""
    started()
    monkeypatch.setitem(LOSSES, "small/lr=0.04/seed1", math.nan)
    monkeypatch.setitem(LOSSES, "grown/seed2", math.nan)
    of = study()
    queue(of).run()
    plan = make_plan(of, loss_of)
    text = write_report(plan, tmp_path / "out")
    assert "0.04 diverged; chosen 0.02" in text and "one seed, 1 of 2 seeds diverged" in text
    found = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    grown = found["arms"][2]
    assert grown["loss"]["by_seed"] == {"1": 2.1} and grown["diverged"] == 1


def test_a_loss_that_was_no_number_when_it_was_logged(study, monkeypatch):
    monkeypatch.setattr(result, "resolve", lambda folder: folder)
    empty = SimpleNamespace(manifest=SimpleNamespace(files={}))
    monkeypatch.setattr(result, "open_checkpoint", lambda folder: empty)
    node = make_plan(study()).nodes[0]
    node.folder.mkdir(parents=True)
    (node.folder / "config.yml").write_text("{}")
    records = [{"eval/loss": 3.0}, {"perf/step_seconds": 1.0, "perf/tokens_per_second": 5.0}, {"eval/loss": None}]
    lines = [json.dumps({"step": step, "tokens": 9, "flops": 9.0, **more}) for step, more in zip((0, 5, 5), records)]
    (node.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = result.measure(node)
    assert math.isnan(found.loss) and found.curve == ((9, 9.0, 3.0),)
    write_result(node, found)
    assert math.isnan(read_result(node).loss) and "NaN" not in (node.folder / "result.json").read_text()


def test_a_run_that_diverges_has_ended(study, started, monkeypatch):
    """The guard ends it with an error, of which torchrun makes another code. It is the worst of its sweep."""
    lines, fake = [], started(DIVERGES) or module.measure

    def measured(node):
        failed = "lr=0.04" in node.name or "going_on" in node.name
        return measure(node) if failed else fake(node)

    monkeypatch.setattr(module, "measure", measured)
    of = study(more=[{"name": "more", "parent": "going_on", "by": "branch", "flops": 3e7, "decay": 0.1,
                      "comparable": False}])  # fmt: skip
    queue(of, say=lines.append).run()
    nodes = {node.name: node for node in make_plan(of, loss_of).nodes}
    diverged = {name: read_result(node) for name, node in nodes.items() if math.isnan(read_result(node).loss)}
    expected = {"small/lr=0.04/seed1", *(f"{arm}/seed{seed}" for arm in ("going_on", "more") for seed in (1, 2))}
    assert diverged.keys() == expected
    assert (diverged["small/lr=0.04/seed1"].tokens, diverged["more/seed1"].own_tokens) == (1280, 0)
    assert "more/seed1: does not begin, because going_on/seed1 has diverged" in lines
    assert any(line.startswith("small/lr=0.04/seed1: has diverged after") for line in lines)
    text = in_words(results_of(make_plan(of, loss_of)))
    assert "0.04 diverged; chosen 0.02" in text
    assert total_seconds(make_plan(of, loss_of), 1, Speeds({}, 1e9).seconds) == 0


def test_a_run_that_another_process_has_failed_at_is_not_started_again(study, started, monkeypatch):
    """Until the study is: then each of its processes has seen the failure before it began."""
    of = study(arms={"going_on": None, "grown": None}, seeds=[1])
    count, all_began = Path(of.dir, "count"), Path(of.dir, "all_began")
    names = started(
        f"import os, sys, time; open({str(count)!r}, 'a').write(sys.argv[1] + chr(10))\n"
        f"while not os.path.exists({str(all_began)!r}): time.sleep(0.01)\n"
        "sys.exit(2 if 'lr=0.04' in sys.argv[1] else 0)"
    )
    errors, began = [], itertools.count(1)

    def noted(study_dir):
        marks = failure_times(study_dir)
        if next(began) == 3:
            all_began.touch()
        return marks

    monkeypatch.setattr(module, "failure_times", noted)

    def work():
        with pytest.raises(UserError, match="1 of the runs failed") as failed:
            queue(of, workers=1).run()
        errors.append(str(failed.value))

    Path(of.dir).mkdir()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert len(errors) == 3 and all("exit code 2, see" in error for error in errors)
    assert sum("lr=0.04" in line for line in count.read_text().splitlines()) == 1 and len(names) == 2
    work()
    assert sum("lr=0.04" in line for line in count.read_text().splitlines()) == 2


def test_times_of_failures_while_another_one_is_removed(study, monkeypatch):
    of = study()
    first, second = make_plan(of).nodes[:2]
    for node in (first, second):
        write_failure(node, of.dir, "exit code 2")
    names = os.listdir(Path(of.dir, "failed"))
    monkeypatch.setattr("os.listdir", lambda path: [*names, "gone"])
    assert failure_times(of.dir).keys() == set(names)
    assert failure_time(failure_file(first, of.dir)) == failure_times(of.dir)[failure_file(first, of.dir).name]


def test_a_run_that_failed_may_be_corrected(study, started):
    """It begins anew, and its folder as it was is kept; what has ended is the same run as before."""
    fails = "import sys; sys.exit(2 if 'grown_seed1' in sys.argv[1] else 0)"
    names, of = started(fails), study()
    nodes = {node.name: node for node in make_plan(of, lambda node: LOSSES.get(node.name, 2.0)).nodes}
    failed = nodes["grown/seed1"]
    failed.folder.mkdir(parents=True)
    (failed.folder / "train.log").write_text("what it was\n")
    with pytest.raises(UserError, match="1 of the runs failed"):
        queue(of).run()
    assert has_failed(failed, of.dir) and not has_failed(nodes["grown/seed2"], of.dir)
    changed = merged(BIGGER, {"optimizer": {"weight_decay": 0.3}})
    corrected = study(arms={"grown": {"overrides": changed}})
    with pytest.raises(ConfigError) as refused:
        check_unchanged(make_plan(corrected, loss_of))
    assert [text.partition(": was begun")[0] for text in refused.value.problems] == [str(nodes["grown/seed2"].folder)]
    shutil.rmtree(nodes["grown/seed2"].folder)
    check_unchanged(make_plan(corrected, loss_of))
    del names[:]
    lines = []
    started()
    queue(corrected, say=lines.append).run()
    assert sorted(names) == ["grown/seed1", "grown/seed2"] and not has_failed(failed, of.dir)
    assert (failed.folder.parent / "seed1.failed1" / "train.log").read_text() == "what it was\n"
    assert not (failed.folder / "train.log").exists()
    assert sum("has failed with another configuration, begins anew" in line for line in lines) == 1


def test_a_run_that_failed_goes_on_when_it_is_the_same(study, started):
    names, of = started("raise SystemExit(1)"), study()
    with pytest.raises(UserError, match="3 of the runs failed"):
        queue(of).run()
    node = make_plan(of).nodes[0]
    node.folder.mkdir(parents=True)
    (node.folder / "train.log").write_text("so far\n")
    started()
    queue(of).run()
    assert len(names) == 8 and (node.folder / "train.log").read_text() == "so far\n"
