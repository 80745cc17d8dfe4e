"""The fit of a law finds the law that losses were made by."""

from __future__ import annotations

import pytest

from megatron_tf.costs.law import Law, law_of
from megatron_tf.study.law import Point, fit, law_in_json

CHINCHILLA = Law(1.69, 406.4, 0.34, 410.7, 0.28)
SMALL = Law(1.2, 30.0, 0.25, 900.0, 0.4)


def points(law, sizes=(1e5, 3e5, 1e6), tokens=(3e6, 1e7, 4e7), change=lambda number: 0.0):
    pairs = [(size, length) for size in sizes for length in tokens]
    return [
        Point(int(size), int(length), 6 * size * length, law.loss(size, length) + change(number))
        for number, (size, length) in enumerate(pairs)
    ]


@pytest.mark.parametrize("law", [CHINCHILLA, SMALL])
def test_a_law_without_noise_is_found(law):
    found = fit(points(law))
    for key in ("E", "alpha", "beta"):
        assert getattr(found, key) == pytest.approx(getattr(law, key), rel=1e-2), key
    assert found.residual < 1e-4 and found.points == 9
    assert found.loss(2e5, 2e7) == pytest.approx(law.loss(2e5, 2e7), abs=1e-4)
    assert found.parameters == (1e5, 1e6) and found.flops == (pytest.approx(6 * 3e11), pytest.approx(6 * 4e13))


def test_one_run_that_went_wrong_changes_little():
    found = fit(points(SMALL, change=lambda number: 0.5 if number == 4 else 0.0))
    assert found.loss(2e5, 2e7) == pytest.approx(SMALL.loss(2e5, 2e7), abs=0.01)
    assert found.residual == pytest.approx(0.5, abs=0.01)


def test_too_few_runs_give_none():
    few = points(SMALL, sizes=(1e5, 1e6))
    assert law_in_json(few)["missing"] == (
        "a law has 5 numbers and takes 6 runs of 3 sizes and 3 lengths, and here are 6 of 2 sizes and 3 lengths"
    )
    assert "missing" in law_in_json(points(SMALL, tokens=(1e7,)) * 3)


def test_it_is_in_json_what_it_was():
    written = law_in_json(points(SMALL))
    law = law_of(written)
    assert law.points == 9 and law.alpha == written["alpha"] and "9 runs of 1e+05 to 1e+06 parameters" in law.in_words()
