from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_tf.engine import step_clock
from megatron_tf.engine.step_clock import PHASES, StepClock, describe_shares


@pytest.fixture
def time(monkeypatch):
    """Seconds that pass in `sleep` alone: on a loaded machine they pass anywhere."""
    passed = [0.0]

    def sleep(seconds):
        passed[0] += seconds

    monkeypatch.setattr(step_clock, "time", SimpleNamespace(perf_counter=lambda: passed[0]))
    return SimpleNamespace(sleep=sleep)


def test_time_belongs_to_the_innermost_phase(time):
    clock = StepClock()
    with clock.step(measured=True):
        time.sleep(0.02)
        with clock.phase("forward"):
            time.sleep(0.02)
            with clock.phase("communication"):
                time.sleep(0.04)
            time.sleep(0.02)
    shares = clock.shares()
    assert set(shares) == {*PHASES, "other"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["communication"] == pytest.approx(0.4) == shares["forward"]
    assert shares["other"] == pytest.approx(0.2)
    assert shares["optimizer"] == 0


def test_only_measured_steps_count(time):
    clock = StepClock()
    with clock.step(measured=False), clock.phase("data"):
        pass
    assert clock.shares() == {}
    for name in ("data", "backward"):  # the second step replaces the first
        with clock.step(measured=True), clock.phase(name):
            time.sleep(0.01)
    with clock.phase("optimizer"):  # outside of any step
        pass
    assert clock.shares()["backward"] == 1
    assert clock.shares()["data"] == clock.shares()["optimizer"] == 0


def test_an_error_in_a_phase_does_not_stop_the_clock_for_good(time):
    clock = StepClock()
    with pytest.raises(ValueError), clock.step(measured=True), clock.phase("forward"):
        raise ValueError
    with clock.step(measured=True), clock.phase("backward"):
        time.sleep(0.01)
    assert clock.shares()["backward"] == 1


def test_description():
    assert describe_shares({"data": 0.004, "forward": 0.31, "backward": 0.686}) == "forward 31% backward 69%"
