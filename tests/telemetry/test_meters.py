from __future__ import annotations

import json

import pytest

from megatron_tf.telemetry.meters import (
    MeanMeter,
    Rates,
    ThroughputMeter,
    format_duration,
    mfu,
    peak_bf16_flops,
)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def meter(clock):
    return ThroughputMeter(clock)


def test_each_lap_is_measured_on_its_own(meter, clock):
    meter.start()
    clock.now += 8
    assert meter.lap(steps=4, tokens=4000) == Rates(2.0, tokens_per_second=500.0, data_wait_share=0.0)
    clock.now += 1
    assert meter.lap(steps=1, tokens=1000) == Rates(1.0, tokens_per_second=1000.0, data_wait_share=0.0)


def test_the_share_of_waiting_for_data_is_of_one_lap(meter, clock):
    meter.start()
    meter.waited(1.0)
    with meter.paused():
        clock.now += 50
    meter.waited(2.0)
    clock.now += 12
    assert meter.lap(steps=2, tokens=2).data_wait_share == 0.25
    clock.now += 1
    assert meter.lap(steps=1, tokens=1).data_wait_share == 0.0
    clock.now += 1
    meter.waited(1.001)  # another rank's clock
    assert meter.lap(steps=1, tokens=1).data_wait_share == 1.0


def test_evaluation_and_saving_do_not_count(meter, clock):
    meter.start()
    clock.now += 2
    with meter.paused():
        clock.now += 100
        with meter.paused():  # a save within an evaluation
            clock.now += 100
        clock.now += 100
    clock.now += 2
    assert meter.lap(steps=2, tokens=400) == Rates(2.0, tokens_per_second=100.0, data_wait_share=0.0)


def test_the_clock_goes_on_after_a_failed_evaluation(meter, clock):
    meter.start()
    with pytest.raises(ValueError, match="evaluation"), meter.paused():
        clock.now += 100
        raise ValueError("evaluation")
    clock.now += 2
    assert meter.lap(steps=1, tokens=2).step_seconds == 2.0


def test_a_meter_that_stands_stays_so(meter, clock):
    with meter.paused():
        clock.now += 5
    clock.now += 5
    assert meter.lap(steps=1, tokens=1) == Rates(0.0, 0.0, 0.0)
    meter.start()
    clock.now += 1
    meter.start()  # begins anew
    clock.now += 3
    assert meter.lap(steps=1, tokens=3).step_seconds == 3.0


def test_a_lap_of_nothing_divides_by_nothing(meter, clock):
    meter.start()
    meter.waited(1e-9)
    assert meter.lap(steps=1, tokens=100) == Rates(0.0, 0.0, 0.0)
    clock.now += 1
    assert meter.lap(steps=0, tokens=0) == Rates(0.0, 0.0, 0.0)


def test_mfu_is_of_the_peak_of_all_devices():
    assert mfu(1000.0, flops_per_token=6e9, peak_flops=1e13, num_devices=2) == pytest.approx(0.3)
    assert mfu(1000.0, flops_per_token=6e9, peak_flops=None, num_devices=2) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Tesla V100-SXM2-32GB", None),  # has no bf16
        ("Intel(R) Xeon(R) Platinum 8480C", None),
        ("", None),
    ],
)
def test_peak_by_name(name, peak):
    assert peak_bf16_flops(name) == peak


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (42.9, "0:00:42"), (3723.4, "1:02:03"), (86400, "24:00:00"), (-1, "0:00:00")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_a_mean_is_of_the_values_since_the_last_one():
    meter = MeanMeter()
    assert meter.take() is None
    for value in (2.0, float("nan"), 4.0, float("inf")):
        meter.add(value)
    assert meter.take() == 3.0 and meter.take() is None


def test_a_mean_goes_on_in_another_process():
    values = [0.1, 0.7, 1e-9, 3.3]
    whole, first = MeanMeter(), MeanMeter()
    for value in values:
        whole.add(value)
    for value in values[:2]:
        first.add(value)
    second = MeanMeter(json.loads(json.dumps(first.state())))
    for value in values[2:]:
        second.add(value)
    assert second.take() == whole.take()
