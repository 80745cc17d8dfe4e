from __future__ import annotations

import pytest
from tiny import run_config

from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.engine.schedule import decay_step, learning_rate


def optimizer(**schedule):
    return Optimizer(lr=1e-3, schedule=schedule)


def test_first_update_has_rate_zero_under_warmup():
    assert learning_rate(0, optimizer(warmup_steps=10), 100) == 0
    assert learning_rate(5, optimizer(warmup_steps=10), 100) == pytest.approx(5e-4)
    assert learning_rate(10, optimizer(warmup_steps=10), 100) == pytest.approx(1e-3)


def test_without_warmup_the_first_update_has_the_full_rate():
    assert learning_rate(0, optimizer(), 100) == pytest.approx(1e-3)


def test_cosine_ends_at_the_minimum_and_stays_there():
    adam = optimizer(warmup_steps=10, min_lr=1e-4)
    assert learning_rate(55, adam, 100) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(100, adam, 100) == pytest.approx(1e-4)
    assert learning_rate(150, adam, 100) == pytest.approx(1e-4)


def test_constant():
    assert learning_rate(77, optimizer(type="constant", warmup_steps=10), 100) == 1e-3


def test_warmup_stable_decay():
    adam = optimizer(type="wsd", warmup_steps=10, decay_steps=20, min_lr=1e-4)
    assert learning_rate(5, adam, 100) == pytest.approx(5e-4)
    assert learning_rate(10, adam, 100) == learning_rate(80, adam, 100) == 1e-3
    assert learning_rate(90, adam, 100) == pytest.approx((1e-3 + 1e-4) / 2)
    assert learning_rate(100, adam, 100) == learning_rate(120, adam, 100) == pytest.approx(1e-4)


@pytest.mark.parametrize("training", [{"train_steps": 20}, {"train_steps": None, "train_tokens": 20 * 8 * 16 - 5}])
def test_the_step_that_the_decay_begins_with(training):
    """The last step at the full rate, also when the batch is another one than the schedule counts in."""
    config = run_config(training=training)
    wsd = optimizer(type="wsd", warmup_steps=2, decay_steps=5).schedule
    assert decay_step(wsd, plan_batches(config, 1)) == 15
    assert decay_step(optimizer().schedule, plan_batches(config, 1)) is None
    if training["train_steps"] is None:
        resumed = plan_batches(config, 1, step=5, tokens=5 * 4 * 16, schedule_unit=4 * 16)
        assert decay_step(wsd, resumed) == 5 + -(-(40 - 5 - 5) // 2)


def test_a_decay_by_the_square_root():
    """It begins and ends where the straight one does, and is below it between."""
    adam = optimizer(type="wsd", decay_steps=20, decay_shape="sqrt", min_lr=1e-4)
    assert learning_rate(80, adam, 100) == 1e-3
    assert learning_rate(85, adam, 100) == pytest.approx(1e-4 + 9e-4 * 0.5)
    assert learning_rate(100, adam, 100) == pytest.approx(1e-4)
