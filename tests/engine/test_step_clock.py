from __future__ import annotations

import time

import pytest

from megatron_tf.engine.step_clock import PHASES, StepClock, describe_shares


def test_time_belongs_to_the_innermost_phase():
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
    assert shares["communication"] == pytest.approx(0.4, abs=0.1) == shares["forward"]
    assert shares["other"] == pytest.approx(0.2, abs=0.1)
    assert shares["optimizer"] == 0


def test_only_measured_steps_count():
    clock = StepClock()
    with clock.step(measured=False), clock.phase("data"):
        pass
    assert clock.shares() == {}
    for name in ("data", "backward"):  # the second step replaces the first
        with clock.step(measured=True), clock.phase(name):
            time.sleep(0.01)
    with clock.phase("optimizer"):  # outside of any step
        pass
    assert clock.shares()["backward"] > 0.8
    assert clock.shares()["data"] == clock.shares()["optimizer"] == 0


def test_an_error_in_a_phase_does_not_stop_the_clock_for_good():
    clock = StepClock()
    with pytest.raises(ValueError), clock.step(measured=True), clock.phase("forward"):
        raise ValueError
    with clock.step(measured=True), clock.phase("backward"):
        time.sleep(0.01)
    assert clock.shares()["backward"] > 0.8


def test_description():
    assert describe_shares({"data": 0.004, "forward": 0.31, "backward": 0.686}) == "forward 31% backward 69%"
