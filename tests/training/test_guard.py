from __future__ import annotations

import pytest

from megatron_tf.config.sections.training import Guard
from megatron_tf.errors import TrainingError
from megatron_tf.training.guard import LossGuard


def guard(state=None, **config):
    return LossGuard(Guard(**config), state or {})


def test_skipped_steps_in_a_row_stop_the_run():
    watched = guard(nonfinite_patience=3)
    assert "2 in a row" in [watched.skipped(step, "loss nan") for step in (1, 2)][-1]
    watched.watch(3, 1.0)
    watched.skipped(4, "loss nan")
    watched.skipped(5, "loss nan")
    with pytest.raises(TrainingError, match="step 6: loss nan.*3 in a row"):
        watched.skipped(6, "loss nan")
    with pytest.raises(TrainingError, match=r"guard.nonfinite is stop"):
        guard(nonfinite="stop").skipped(1, "loss nan")


def test_a_spike_is_several_losses_far_above_their_mean():
    watched = guard(spike_factor=1.5, spike_patience=3)
    for step in range(30):
        assert watched.watch(step, 4.0) is None
    assert watched.watch(30, 7.0) is None and watched.watch(31, 7.0) is None
    assert watched.watch(32, 4.0) is None  # over before it counted
    assert watched.watch(33, 7.0) is None and watched.watch(34, 7.0) is None
    with pytest.raises(TrainingError, match="more than 1.5 times its mean 4.0000, 3 steps in a row: the run stops"):
        watched.watch(35, 7.0)


def test_a_falling_loss_is_no_spike():
    watched = guard(spike_factor=1.01, spike_patience=1)
    assert all(watched.watch(step, 10 / (1 + step)) is None for step in range(100))


def test_lowering_the_rate_goes_on_with_a_new_mean():
    watched = guard(spike_factor=2.0, spike_patience=2, spike_action="lower_lr", spike_lr_factor=0.25)
    for step in range(20):
        watched.watch(step, 1.0)
    assert watched.watch(20, 5.0) is None
    assert "learning rate is now 0.25 times" in watched.watch(21, 5.0)
    assert watched.lr_factor == 0.25
    assert all(watched.watch(step, 5.0) is None for step in range(22, 60))


def test_a_resumed_guard_decides_alike():
    losses = [3.0] * 25 + [9.0, 9.0]
    whole, first = (guard(spike_factor=2.0, spike_patience=3, spike_action="lower_lr") for _ in range(2))
    for step, loss in enumerate(losses):
        assert whole.watch(step, loss) == first.watch(step, loss)
    resumed = guard(first.state(), spike_factor=2.0, spike_patience=3, spike_action="lower_lr")
    assert resumed.watch(27, 9.0) == whole.watch(27, 9.0) is not None
    assert resumed.state() == whole.state()


def test_an_explosion_while_the_mean_is_learnt_is_seen_afterwards():
    watched = guard(spike_factor=1.5, spike_patience=1)
    for step in range(20):
        assert watched.watch(step, 8.0 + step) is None
    with pytest.raises(TrainingError, match="its mean 8.0000"):
        watched.watch(20, 30.0)


def test_the_mean_is_there_for_whoever_switches_the_guard_on_later():
    before = guard()
    for step in range(30):
        assert before.watch(step, 4.0) is None
    with pytest.raises(TrainingError, match="more than 1.5 times its mean 4.0000"):
        guard(before.state(), spike_factor=1.5, spike_patience=1).watch(30, 7.0)


def test_a_run_that_ends_in_skipped_steps_has_failed():
    watched = guard()
    watched.check_end(9)
    watched.skipped(10, "loss nan")
    assert watched.is_skipping
    with pytest.raises(TrainingError, match="reached its last step 10, but this step was skipped"):
        watched.check_end(10)


def test_the_search_for_a_loss_scale_is_no_failure_unless_it_is_all_that_a_run_does():
    watched = guard(nonfinite_patience=5)
    for _ in range(4):
        watched.overflowed()
    assert not watched.is_skipping  # what there is may be saved
    watched.check_end(9, 8.0)
    watched.watch(5, 1.0)
    watched.overflowed()
    watched.check_end(6, 8.0)
    short = guard()
    short.overflowed()
    resumed = guard(short.state())
    resumed.overflowed()
    expected = (
        "last step 2, but the last 2 were skipped.* to 8. .*In a new run.dir.*initial_scale_power to at most 2 .this "
        "scale overflowed.*, or training.precision to bf16"
    )
    with pytest.raises(TrainingError, match=expected):
        resumed.check_end(2, 8.0)
    resumed.check_end(3, 8.0)


def test_many_overflows_at_the_end_of_a_long_run_are_a_failure():
    watched = guard(nonfinite_patience=5)
    watched.watch(1, 1.0)
    for _ in range(5):
        watched.overflowed()
    with pytest.raises(TrainingError, match="last step 1,000, but the last 5 were skipped, because .* overflowed fp16"):
        watched.check_end(1000, 2.0)


def test_the_least_loss_scale_is_named_with_a_precision_that_needs_none():
    with pytest.raises(TrainingError, match=r"The loss scale 1 is the least \(deepspeed.fp16.min_loss_scale\)"):
        guard(nonfinite_patience=1).skipped(4, "loss nan", 1.0)
