"""Saves killed by SIGKILL: whatever the moment, the newest complete checkpoint is found and whole."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

from megatron_tf.checkpoint.manager import find_latest
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.writer import FAULT_POINTS, REPLACING_POINT
from megatron_tf.runtime.local_ranks import IMPORTS

NUMEL = 30_000

SAVE = """
import os, signal, torch
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.writer import Piece, save_checkpoint

def at(point):
    if point == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

def save(step, value):
    index = CheckpointIndex(step, step, step, {}, {}, expected_tensors({"a": (numel,)}), {"a": ((0, numel, step),)})
    pieces = [Piece("a", state, 0, numel, torch.full((numel,), float(value))) for state in STATES]
    save_checkpoint(root, pieces, index, rank=0, world_size=1, token=f"{os.getpid()}-{value}", at=at)
"""
SAVE_ONCE = SAVE + "save(1, value)"
SAVE_FOR_EVER = (
    SAVE
    + """
for step in range(value, 1000000):
    save(step, step)
    with open(log, "a") as file:
        file.write(f"{step}\\n")
"""
)


@pytest.fixture(scope="module")
def processes():
    """Children that are forked from one process which has torch imported already and no thread running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTS)  # the same process forks the ranks of other tests
    return context


@pytest.fixture
def child(processes, tmp_path):
    """Start a process that saves `value`, kills itself at a point, and has the exit code `.exitcode` when joined."""

    def start(value, kill_at="never", code=SAVE_ONCE, log=None):
        names = {"root": str(tmp_path / "checkpoints"), "value": value, "kill_at": kill_at, "numel": NUMEL, "log": log}
        process = processes.Process(target=exec, args=(code, names))
        process.start()
        return process

    return start


@pytest.fixture
def exit_code(child):
    def run(value, kill_at="never"):
        process = child(value, kill_at)
        process.join()
        return process.exitcode

    return run


@pytest.fixture
def root(tmp_path):
    return tmp_path / "checkpoints"


def value_of(path) -> float:
    """The one number that fills a complete checkpoint of these tests."""
    reader = open_checkpoint(path)
    reader.verify()
    values = torch.cat([reader.read("a", state, 0, NUMEL) for state in ("weight", "exp_avg", "exp_avg_sq")])
    assert torch.equal(values, values[:1].expand_as(values))
    return float(values[0])


@pytest.mark.parametrize("point", FAULT_POINTS)
def test_killed_in_the_first_save(root, exit_code, point):
    assert exit_code(1, kill_at=point) == -signal.SIGKILL, "the point was not reached"
    path, skipped = find_latest(root, verify=True)
    published = FAULT_POINTS.index(point) >= FAULT_POINTS.index("renamed")
    assert (path is not None) == published and skipped == []
    assert exit_code(2) == 0
    assert [entry.name for entry in root.iterdir()] == ["step_00000001"]
    assert value_of(root / "step_00000001") == 2


@pytest.mark.parametrize("point", [*FAULT_POINTS, REPLACING_POINT])
def test_killed_while_replacing_a_checkpoint(root, exit_code, point):
    assert exit_code(1) == 0
    assert exit_code(2, kill_at=point) == -signal.SIGKILL, "the point was not reached"
    path, skipped = find_latest(root, verify=True)
    published = point in ("renamed", "done")
    assert value_of(path) == (2 if published else 1) and skipped == []
    assert exit_code(3) == 0
    assert [entry.name for entry in root.iterdir()] == ["step_00000001"]
    assert value_of(root / "step_00000001") == 3


def test_a_checkpoint_that_was_set_aside_returns_when_the_next_save_fails(root, exit_code):
    assert exit_code(1) == 0
    assert exit_code(2, kill_at=REPLACING_POINT) == -signal.SIGKILL
    assert exit_code(3, kill_at="folder") == -signal.SIGKILL
    assert value_of(root / "step_00000001") == 1


def test_killed_at_random_moments(root, child, tmp_path):
    """Each child saves step after step until it is killed; what it reported as saved must be there and whole."""
    rng, newest, log = random.Random(0), 0, tmp_path / "log"
    for _ in range(8):
        log.write_text("")
        process = child(newest + 1, code=SAVE_FOR_EVER, log=str(log))
        while not log.read_text():
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reported = [int(line) for line in log.read_text().split()]
        path, skipped = find_latest(root, verify=True)
        assert skipped == []
        step = open_checkpoint(path).index.step
        assert step >= reported[-1] and value_of(path) == step
        newest = step
