"""Runs that begin with what a decay began with: a branch that trains longer, and a growth."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from launching import environment, train, warm
from live import PATIENCE_SECONDS

from megatron_tf.checkpoint import load_logical
from megatron_tf.checkpoint.reader import open_checkpoint

WSD = "optimizer.schedule={type: wsd, warmup_steps: 2, decay_steps: 2}"
# One process for all runs: only the first pays for the start.
SCRIPT = """
from megatron_tf import train
folder, wsd = {folder!r}, {wsd!r}
def run(name, *overrides):
    own = "run.dir=" + folder + "/" + name
    train(folder + "/config.yml", [own, wsd, "checkpoint.keep_before_decay=true", *overrides])
run("trunk", "checkpoint.interval_steps=1", "checkpoint.keep_last=1")
branch = "branch={{from: " + folder + "/trunk, at: before_decay}}"
run("same", branch)
run("longer", branch, "training.train_steps=8")
run("whole", "training.train_steps=8")
run("grown", "model.parameter_tokens.ffn=60", "growth={{from: " + folder + "/trunk, at: before_decay}}")
"""


def script(folder) -> subprocess.CompletedProcess:
    (folder / "script.py").write_text(SCRIPT.format(folder=str(folder), wsd=WSD))
    return subprocess.run(
        warm([sys.executable, folder / "script.py"]),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        cwd=folder,
    )


def saved(folder, name, step):
    return load_logical(folder / name / "checkpoints" / f"step_{step:08}")


def steps(folder, name):
    return sorted(path.name for path in (folder / name / "checkpoints").glob("step_*"))


def test_one_trunk_and_what_begins_before_its_decay(folder):
    done = script(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    # the newest one, and what the decay began with, which keep_last would have deleted
    assert steps(folder, "trunk") == ["step_00000004", "step_00000006"]
    assert f"branched off {folder}/trunk/checkpoints/step_00000004 at step 4" in done.stdout
    for name, other, step in (("same", "trunk", 6), ("longer", "whole", 8)):
        ours, theirs = saved(folder, name, step), saved(folder, other, step)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
        index = open_checkpoint(folder / name / "checkpoints" / f"step_{step:08}").index
        assert (index.step, index.tokens) == (step, step * 8 * 16)
    (entry,) = open_checkpoint(folder / "grown" / "checkpoints" / "step_00000006").index.growth_history
    assert (entry["step"], entry["tokens"]) == (4, 4 * 8 * 16)
    assert entry["loss_before"] == pytest.approx(entry["loss_after"])
    short = train(
        folder,
        f"branch={{from: {folder}/trunk, at: before_decay}}",
        f"run.dir={folder}/short",
        "training.train_steps=4",
    )
    assert short.returncode == 2 and not (folder / "short").exists(), short.stdout
    assert "training.train_steps: 4, but the branch begins at 4. Set it to more than 4." in short.stdout


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["branch={from: nowhere}"], "branch.from: nowhere: there is no such folder"),
        (
            ["branch={from: x}", "training.init_from=y"],
            "branch: the run goes on from x, but training.init_from is given as well",
        ),
        (["checkpoint.keep_before_decay=true"], "checkpoint.keep_before_decay: true is for schedule type wsd only"),
    ],
)
def test_what_is_refused(folder, overrides, problem):
    done = train(folder, *overrides)
    assert done.returncode == 2 and problem in done.stdout, done.stdout
