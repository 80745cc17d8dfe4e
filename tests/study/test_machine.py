from __future__ import annotations

import os

import pytest

from megatron_tf.errors import UserError
from megatron_tf.study import machine
from megatron_tf.study.machine import Share, room_for, share, threads


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(machine, "_gpus", list)


def test_runs_never_share_a_core(cores):
    assert share(1, None) == Share(8, 1)
    assert share(2, 2) == Share(2, 2)
    assert share(3, None) == Share(2, 1)
    with pytest.raises(
        UserError, match="--workers: 10 cores for 5 runs of 2 processes at once, and there are 8 here. Give at most 4."
    ):
        share(2, 5)
    for workers in (None, 1):
        with pytest.raises(
            UserError, match="^ranks: 9 cores for 1 run of 9 processes at once, .* 8 here. Set it to less"
        ):
            share(9, workers)


def test_a_study_is_planned_on_a_machine_that_is_too_small_for_it(cores, monkeypatch):
    assert (room_for(9), room_for(3), threads(9, 1), threads(3, 2)) == (1, 2, 1, 1)
    monkeypatch.setattr(machine, "_gpus", lambda: ["4", "5"])
    assert (room_for(4), room_for(1)) == (1, 2)


def test_each_worker_has_gpus_of_its_own(cores, monkeypatch):
    monkeypatch.setattr(machine, "_gpus", lambda: ["4", "5", "6", "7"])
    assert share(2, None) == Share(2, 2, ("4,5", "6,7"))
    with pytest.raises(UserError, match="6 GPUs for 3 runs of 2 processes at once, and there are 4 here"):
        share(2, 3)


def test_runs_of_one_process_may_share_gpus(cores, monkeypatch):
    monkeypatch.setattr(machine, "_gpus", lambda: ["4", "5"])
    assert share(1, None) == Share(2, 4, ("4", "5"))
    assert share(1, 3) == Share(3, 2, ("4", "5", "4"))
    with pytest.raises(UserError, match="--workers: 9 cores for 9 runs of 1 process at once, and there are 8 here"):
        share(1, 9)
    with pytest.raises(UserError, match="--workers: 4 GPUs for 2 runs of 2 processes at once, and there are 2 here"):
        share(2, 2)
