from __future__ import annotations

import math

import pytest

from megatron_tf.study.file import Sweep
from megatron_tf.study.statistics import (
    Cost,
    Interval,
    Optimum,
    cheapest,
    cost_of,
    frontier,
    interval,
    loss_at,
    optimum,
    pooled_deviation,
)
from megatron_tf.study.sweep import choose


def test_interval():
    """Of 1, 2, 3: the deviation of the mean is 1/√3, times 4.303 of two degrees of freedom."""
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.high == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    assert interval([5.0]) == Interval(5.0)
    assert interval([1.0] * 30).low == 1.0


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [([-1.0, -1.1], "better"), ([1.0, 1.1], "worse"), ([-1.0, 1.0], "not significant"), ([-1.0], "one seed")],
)
def test_verdict(differences, verdict):
    assert interval(differences).verdict == verdict


def test_cost_of_a_loss():
    curve = [(1e4, 3.0), (1e2, 5.0), (1e3, 4.0)]
    assert cost_of(4.5, curve).flops == pytest.approx(10**2.5)
    assert cost_of(3.0, curve) == Cost(pytest.approx(1e4))
    assert (cost_of(2.0, curve), cost_of(6.0, curve)) == (Cost(1e4, "more"), Cost(1e2, "less"))


def test_loss_at_a_cost():
    curve = [(1e4, 3.0), (1e2, 5.0)]
    assert loss_at(1e3, curve) == pytest.approx(4.0)
    assert (loss_at(1e2, curve), loss_at(1e4, curve)) == (5.0, pytest.approx(3.0))
    assert loss_at(1.02e4, curve) is None and loss_at(0.98e2, curve) is None
    assert (loss_at(1.01e4, curve, 0.02), loss_at(0.99e2, curve, 0.02)) == (3.0, 5.0)


def test_the_cheapest_of_several_curves():
    steep, flat, point = [(1e2, 5.0), (1e4, 3.0)], [(1e2, 4.0), (1e4, 3.5)], [(1e3, 4.5)]
    assert cheapest(3.2, [steep, flat]) == cost_of(3.2, steep)
    assert cheapest(3.75, [steep, flat]) == cost_of(3.75, flat)
    assert cheapest(2.0, [steep, point]) == Cost(1e3, "more")
    assert cheapest(4.6, [steep, point]) == Cost(cost_of(4.6, steep).flops, "less")
    # a model that ends ahead of the others may have gone on to the loss before they reach it
    ahead, late = [(1e2, 4.0), (1e3, 3.5)], [(5e3, 3.8), (2e4, 3.1)]
    assert cheapest(3.2, [late, ahead]) == Cost(cost_of(3.2, late).flops, "less")
    assert cheapest(3.2, [steep, ahead, [(1e2, 3.9), (1e3, 3.4), (1e5, 3.3)]]) == cost_of(3.2, steep)
    assert cheapest(3.2, [steep, point]) == cost_of(3.2, steep) and cheapest(3.6, [late, ahead]) == cost_of(3.6, ahead)


def sweep(losses, **fields):
    values = tuple(fields.pop("values", (1.0, 2.0, 4.0)))
    return choose(Sweep(key="optimizer.lr", values=values, **fields), losses.get)


def test_the_lowest_loss_is_chosen_and_an_end_is_told():
    inner = sweep({1.0: 3.0, 2.0: 2.0, 4.0: 5.0})
    assert (inner.value, inner.at_end) == (2.0, False)
    outer = sweep({1.0: 3.0, 2.0: 4.0, 4.0: 5.0})
    assert (outer.value, outer.at_end) == (1.0, True)
    assert sweep({1.0: 3.0, 2.0: 4.0}).value is None
    assert sweep({1.0: math.nan, 2.0: 4.0, 4.0: 3.0}).value == 4.0


def test_a_sweep_goes_on_beyond_its_end():
    losses = {1.0: 3.0, 2.0: 2.0, 4.0: 1.0}
    assert sweep(losses, extend=1).values == (1.0, 2.0, 4.0, 8.0)
    found = sweep({**losses, 8.0: 0.5}, extend=1)
    assert (found.value, found.at_end) == (8.0, True)
    assert sweep({**losses, 8.0: 1.5}, extend=2).value == 4.0
    low = {1.0: 1.0, 2.0: 2.0, 4.0: 3.0}
    assert sweep(low, extend=1).values == (0.5, 1.0, 2.0, 4.0)


def test_optimum():
    losses = {rate: 2 + 0.3 * math.log(rate / 3e-3) ** 2 for rate in (1e-3, 2e-3, 4e-3, 8e-3)}
    found = optimum(losses, noise=0.3)
    assert found.value == pytest.approx(3e-3)
    assert (found.low, found.high) == (pytest.approx(3e-3 / math.e), pytest.approx(3e-3 * math.e))
    assert optimum({1.0: 2.0, 2.0: 3.0, 4.0: 4.0}, 0.1) == Optimum(1.0) == optimum({1.0: 5.0}, 0.1)
    assert found.overlaps(Optimum(8e-3, 8e-3, 9e-3)) and not found.overlaps(Optimum(1e-2, 9e-3, 2e-2))


def test_pooled_deviation():
    assert pooled_deviation([[1.0, 3.0], [10.0], [4.0, 4.0]]) == pytest.approx(1.0)
    assert pooled_deviation([[1.0], []]) == 0


def test_of_several_points_at_one_budget_the_best_counts():
    """A model that was trained with a rate that is too high costs more to a loss than it needs to."""
    tuned = [(1e12, 4.0), (2e12, 3.5), (4e12, 3.0)]
    with_others = [*tuned, (1e12, 4.5), (2e12, 3.9), (2.01e12, 3.7), (4e12, 3.4)]
    assert frontier(with_others) == tuned
    for loss in (4.2, 4.0, 3.6, 3.5, 3.45, 3.2, 3.0, 2.9):
        assert cost_of(loss, with_others) == cost_of(loss, tuned), loss
    for flops in (0.9e12, 1e12, 1.5e12, 2e12, 2.01e12, 3e12, 4e12, 5e12):
        assert loss_at(flops, with_others) == loss_at(flops, tuned), flops


def test_a_longer_run_that_is_worse_ends_no_curve():
    curve = [(1e12, 4.0), (2e12, 3.5), (4e12, 3.6)]
    assert loss_at(3e12, curve) == 3.5 and loss_at(5e12, curve) is None
    assert cost_of(3.4, curve) == Cost(4e12, "more") and cost_of(3.55, curve).flops < 2e12
