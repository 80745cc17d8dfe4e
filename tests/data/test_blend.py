"""Blends are exact over any window and consume each source without gaps."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from megatron_tf.data.blend import MAX_DEVIATION, Blend


class FakeSource:
    """Sample i is [number of the source, i]."""

    def __init__(self, number: int):
        self.number, self.seq_length = number, 1

    def sample(self, index: int) -> np.ndarray:
        return np.array([self.number, index])


def blend(weights, seed=0) -> Blend:
    return Blend([FakeSource(number) for number in range(len(weights))], weights, seed)


WEIGHTS = {
    "one": [3.0],
    "equal": [1.0, 1.0],
    "thirds": [1.0, 1.0, 1.0],
    "decimal": [0.1, 0.2, 0.7],
    "tiny": [1e-4, 1.0],
    "geometric": [2.0**-k for k in range(12)],
    "fibonacci": [1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0],
    "many": np.random.default_rng(0).uniform(0.01, 1, 40).tolist(),
}


def worst_windows(mixed: Blend, weights, length: int, start: int = 0) -> np.ndarray:
    """Of each source, by how many samples it is off its share in the worst of all windows of `length` samples."""
    taken = np.zeros((length + 1, len(weights)))
    for index in range(length):
        taken[index + 1] = taken[index]
        taken[index + 1, mixed.locate(start + index)[0]] += 1
    share = np.array(weights) / sum(weights)
    # A window from s to e deviates by drift[e] - drift[s]: the largest over all windows is the range of the drift.
    drift = taken - np.arange(length + 1)[:, None] * share
    return drift.max(0) - drift.min(0)


def proven_bounds(mixed: Blend, weights) -> np.ndarray:
    """Of each source, the sum of (1 - 1/q)·w/v over its path, which the module's words derive."""
    bounds = np.zeros(len(weights))

    def weight(node) -> float:
        return weights[node] if isinstance(node, int) else weight(node.left) + weight(node.right)

    def descend(node, path: list[tuple[float, float]]) -> None:
        if isinstance(node, int):
            bounds[node] = sum(largest * weights[node] / below for largest, below in path)
            return
        for child in (node.left, node.right):
            descend(child, [*path, (1 - 1 / node.denominator, weight(child))])

    descend(mixed._tree, [])
    return bounds


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_window_is_exact(name, seed):
    weights = WEIGHTS[name]
    mixed = blend(weights, seed)
    bounds = proven_bounds(mixed, weights)
    assert bounds.max() < MAX_DEVIATION
    assert (worst_windows(mixed, weights, 3000) <= bounds + 1e-9).all()


@pytest.mark.parametrize("weights", [[1, 1], [0.3, 0.7], [0.001, 0.999], [123456789, 987654321]])
@pytest.mark.parametrize("start", [0, 12345, 10**12])
def test_two_sources_are_exact_to_a_sample_over_any_window(weights, start):
    assert worst_windows(blend(weights, 5), weights, 2000, start).max() < 1


@pytest.mark.parametrize("start", [0, 10**12])
def test_more_sources_are_within_their_bounds_for_any_weights(start):
    generator = np.random.default_rng(0)
    for number in (3, 4, 7, 15):
        for seed in range(6):
            drawn = generator.dirichlet([0.5] * number) if seed % 2 else generator.uniform(0.05, 1, number)
            weights = [max(float(f"{weight:.3g}"), 1e-3) for weight in drawn]
            mixed = blend(weights, seed)
            worst = worst_windows(mixed, weights, 600, start)
            assert (worst <= proven_bounds(mixed, weights) + 1e-9).all() and worst.max() < 2.5, (weights, seed)


def test_no_order_keeps_three_sources_below_one_over_every_window():
    """Why the bound of more than two is not below one: every sequence of sources of weights 5 : 3 : 2 fails early."""
    share = [Fraction(weight, 10) for weight in (5, 3, 2)]

    def longest(length: int, drift: list[Fraction], low: list[Fraction], high: list[Fraction]) -> int:
        found = length
        for chosen in range(3):
            after = [value + (number == chosen) - share[number] for number, value in enumerate(drift)]
            lows, highs = list(map(min, low, after)), list(map(max, high, after))
            if length < 100 and all(top - bottom < 1 for top, bottom in zip(highs, lows, strict=True)):
                found = max(found, longest(length + 1, after, lows, highs))
        return found

    assert longest(0, [Fraction(0)] * 3, [Fraction(0)] * 3, [Fraction(0)] * 3) == 7


@pytest.mark.parametrize("name", WEIGHTS)
def test_each_source_is_consumed_in_order_without_gaps(name):
    mixed, next_index = blend(WEIGHTS[name], seed=3), {}
    for index in range(2000):
        number, within = mixed.locate(index)
        assert within == next_index.get(number, 0)
        next_index[number] = within + 1


def test_far_samples_are_exact_too():
    """What a source has given by sample 10^12 is known without visiting the samples before."""
    weights, start, length = WEIGHTS["many"], 10**12, 2000
    mixed, first, last = blend(weights), {}, {}
    for index in range(start, start + length):
        number, within = mixed.locate(index)
        assert within == last.get(number, within - 1) + 1
        first.setdefault(number, within)
        last[number] = within
    assert len(first) > 30
    for number, within in first.items():
        share = Fraction(str(weights[number])) / sum(Fraction(str(weight)) for weight in weights)
        assert abs(last[number] + 1 - (start + length) * share) < MAX_DEVIATION
        assert abs(last[number] + 1 - within - length * share) < MAX_DEVIATION


def test_pure_function_of_seed_and_index():
    first, again, other = blend([0.3, 0.7], 1), blend([0.3, 0.7], 1), blend([0.3, 0.7], 2)
    order = random.Random(0).sample(range(500), 500)
    located = {index: first.locate(index) for index in order}
    assert all(again.locate(index) == located[index] for index in range(500))
    assert any(other.locate(index) != located[index] for index in range(500))
    assert [first.sample(5).tolist()] == [list(first.locate(5))]
