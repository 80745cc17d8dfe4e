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


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_window_is_exact(name, seed):
    weights = WEIGHTS[name]
    mixed, length = blend(weights, seed), 3000
    taken = np.zeros((length + 1, len(weights)))
    for index in range(length):
        taken[index + 1] = taken[index]
        taken[index + 1, mixed.locate(index)[0]] += 1
    share = np.array(weights) / sum(weights)
    # A window from s to e deviates by drift[e] - drift[s]: the largest over all windows is the range of the drift.
    drift = taken - np.arange(length + 1)[:, None] * share
    assert (drift.max(0) - drift.min(0)).max() < MAX_DEVIATION


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
