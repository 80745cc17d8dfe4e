from __future__ import annotations

import random

import pytest

from megatron_tf.state.ranges import RangeMap, clip_steps, coverage_problems, intersect, join_steps


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((0, 4), (2, 6), (2, 4)), ((2, 6), (0, 4), (2, 4)), ((0, 9), (3, 4), (3, 4)), ((0, 4), (4, 8), None)],
)
def test_intersect(first, second, expected):
    assert intersect(first, second) == expected


def test_complete_coverage_in_any_order_has_no_problem():
    assert coverage_problems(10, [(7, 10), (0, 3), (3, 7)]) == []
    assert coverage_problems(0, []) == []


@pytest.mark.parametrize(
    ("ranges", "problem"),
    [
        ([(0, 4), (8, 10)], "nothing holds [4, 8)"),
        ([(2, 10)], "nothing holds [0, 2)"),
        ([(0, 7)], "nothing holds [7, 10)"),
        ([], "nothing holds [0, 10)"),
        ([(0, 6), (4, 10)], "[4, 6) is held more than once"),
        ([(0, 10), (2, 3)], "[2, 3) is held more than once"),
        ([(0, 12)], "a range ends at 12, beyond the 10 elements of the tensor"),
        ([(0, 10), (5, 5)], "[5, 5) is not a range"),
    ],
)
def test_gaps_and_overlaps_are_named_with_both_numbers(ranges, problem):
    assert problem in coverage_problems(10, ranges)


def test_coverage_agrees_with_counting_elements():
    rng = random.Random(0)
    for _ in range(500):
        size = rng.randint(1, 12)
        ranges = [tuple(sorted(rng.sample(range(size + 2), 2))) for _ in range(rng.randint(0, 4))]
        counts = [sum(start <= element < stop for start, stop in ranges) for element in range(size + 2)]
        exact = counts == [1] * size + [0, 0]
        assert (coverage_problems(size, ranges) == []) == exact, (size, ranges)


def test_lookup_agrees_with_a_linear_search():
    rng = random.Random(1)
    for _ in range(300):
        cuts = sorted(rng.sample(range(40), 8))
        entries = [(start, stop, str(start)) for start, stop in zip(cuts, cuts[1:], strict=False) if rng.random() < 0.7]
        start, stop = sorted(rng.choices(range(42), k=2))
        expected = [entry for entry in entries if intersect(entry[:2], (start, stop))]
        rng.shuffle(entries)
        assert list(RangeMap(entries).overlapping(start, stop)) == expected


def test_steps_are_clipped_and_joined():
    ranges = [(4, 8, 2), (0, 4, 2), (8, 12, 0)]
    assert clip_steps(ranges, 1, 10) == [(1, 8, 2), (8, 10, 0)]
    assert clip_steps(ranges, 12, 12) == []
    assert join_steps([(0, 2, 1), (3, 4, 1)]) == [(0, 2, 1), (3, 4, 1)]
