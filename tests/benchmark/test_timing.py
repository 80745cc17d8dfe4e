from __future__ import annotations

import pytest
import torch

from megatron_tf.benchmark import timing
from megatron_tf.benchmark.timing import Timing, interleaved

CPU = torch.device("cpu")


def test_ratio_is_paired_by_round():
    """The machine was slow in the second round for both, and the slower one was lucky in the third."""
    fast, slow = Timing((1.0, 9.0, 1.0)), Timing((2.0, 18.0, 1.5))
    assert (fast.median, slow.median) == (1.0, 2.0)
    assert fast.speed_against(slow) == 2.0 and slow.speed_against(fast) == 0.5


def test_calls_take_turns_and_none_is_always_first(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0.0)
    called = []
    times = interleaved({name: lambda name=name: called.append(name) for name in "abc"}, CPU, rounds=3)
    assert "".join(called[-9:]) == "abcbcacab"
    assert {name: len(t.rounds) for name, t in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_seconds_are_of_one_call(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def tick(seconds):
        clock[0] += seconds

    times = interleaved({"short": lambda: tick(0.001), "long": lambda: tick(1.0)}, CPU, rounds=2)
    assert times["short"].rounds == pytest.approx((0.001, 0.001)) and times["long"].rounds == pytest.approx((1.0, 1.0))
