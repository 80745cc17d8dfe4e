"""The permutation is a bijection that mixes; samples cover every token once an epoch."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import numpy as np
import pytest

from megatron_tf.data.indexed import IndexedDataset, IndexedWriter
from megatron_tf.data.samples import KeyedPermutation, TokenSource, mixed
from megatron_tf.errors import DataError


@pytest.mark.parametrize("size", [*range(1, 40), 99, 100, 101, 1000, 65535, 65536, 65537, 99991])
def test_permutation_is_a_bijection(size):
    image = KeyedPermutation(size, (size, 1))(np.arange(size))
    assert np.array_equal(np.sort(image), np.arange(size))


def test_array_and_int_agree():
    for size in (1, 2, 37, 10**6 + 3, 2**40 + 5, 2**62 - 1):
        permutation = KeyedPermutation(size, (3, 4))
        indices = [index for index in (0, 1, 2, 3, size // 3, size - 2, size - 1) if 0 <= index < size]
        one_by_one = [permutation(index) for index in indices]
        assert permutation(np.array(indices)).tolist() == one_by_one
        assert all(type(value) is int and 0 <= value < size for value in one_by_one)
    grid = np.arange(12).reshape(3, 4)
    assert KeyedPermutation(12, (0,))(grid).shape == (3, 4)


def test_large_permutation_is_injective_and_keeps_no_index():
    permutation = KeyedPermutation(300_000_000_000, (1, 0))
    image = permutation(np.arange(10**6, 10**6 + 100_000))
    assert len(np.unique(image)) == 100_000
    assert len(permutation._round_keys) < 20


def test_values_are_pinned():
    """The order of the data is part of every resumed run: a change of it must be a decision."""
    assert KeyedPermutation(1000, (1234, 0))(np.arange(6)).tolist() == [123, 318, 819, 392, 634, 758]


@pytest.mark.parametrize("size", [1000, 4096])
def test_permutation_mixes(size):
    """Chi-square of (where from, where to) in a 10 by 10 table, and of neighbours' distances, over several keys.

    81 degrees of freedom: mean 81, deviation 12.7; the mean over 40 keys deviates by 2.0. Five of these are allowed.
    """
    statistics, distances = [], Counter()
    for key in range(40):
        image = KeyedPermutation(size, (key,))(np.arange(size))
        table = np.histogram2d(np.arange(size), image, bins=10, range=[[0, size], [0, size]])[0]
        row, column = table.sum(1, keepdims=True), table.sum(0, keepdims=True)
        expected = row * column / size
        statistics.append(((table - expected) ** 2 / expected).sum())
        distances.update((np.diff(image) % size).tolist())
    assert abs(np.mean(statistics) - 81) < 10
    # 40 (size - 1) neighbours over size - 1 distances: 40 each on average, as in a Poisson distribution
    assert max(distances.values()) < 40 + 7 * 40**0.5
    assert abs(np.var([distances[d] for d in range(1, size)]) / 40 - 1) < 0.3


def test_all_orders_of_a_small_set_occur():
    orders = {tuple(KeyedPermutation(4, (key,))(np.arange(4)).tolist()) for key in range(1000)}
    assert orders == set(itertools.permutations(range(4)))


def test_keys_give_unrelated_orders():
    first, second = (KeyedPermutation(10_000, key)(np.arange(10_000)) for key in ((5, 0), (5, 1)))
    assert (first == second).sum() < 12  # 1 expected
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def inverse(permutation: KeyedPermutation, image: int) -> int:
    """Back through the network, round by round, and past the values outside of the range, as a proof of its own."""
    left_range, right_range = permutation._left_range, permutation._right_range
    keys = permutation._round_keys[::2]
    while True:
        left, right = divmod(image, right_range)
        for key in reversed(keys):
            right = (right - mixed(left ^ (key >> 1))) % right_range
            left = (left - mixed(right ^ key)) % left_range
        image = left * right_range + right
        if image < permutation.size:
            return image


@pytest.mark.parametrize("size", [2, 37, 10**4, 10**9 + 7, 300_000_000_000, 2**40, 2**61 - 1, 2**62 - 1])
def test_every_image_leads_back_to_where_it_came_from(size):
    """That there is an inverse is what makes it a bijection, also where it is too large to be tried out."""
    generator = random.Random(size)
    for epoch in range(3):
        permutation = KeyedPermutation(size, (7, epoch))
        chosen = [generator.randrange(size) for _ in range(500)]
        assert all(inverse(permutation, permutation(index)) == index for index in (0, size - 1, *chosen))
        assert all(permutation(inverse(permutation, index)) == index for index in chosen)


def test_all_small_permutations_are_bijections():
    for size in range(1, 301):
        for key in range(5):
            assert sorted(KeyedPermutation(size, (key,))(np.arange(size)).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [10**6, 10**9 + 7, 300_000_000_000])
@pytest.mark.parametrize("stride", [1, 2, 1000])
def test_neighbours_are_unrelated(size, stride):
    """Images of indices in a row, near and at a stride, as fractions of the range: 100,000 of them.

    They are spread evenly (chi-square over 1000 cells: mean 999, deviation 44.7), and uncorrelated with those 1, 2 and
    100 places on (deviation 1/sqrt(100,000) = 0.0032), as are the tops of their differences. Five deviations are
    allowed.
    """
    count = min(100_000, size // stride)
    start = (size - count * stride) // 3
    image = KeyedPermutation(size, (11, stride))(np.arange(start, start + count * stride, stride)) / size
    cells = np.histogram(image, bins=1000, range=(0, 1))[0]
    expected = count / 1000
    assert abs(((cells - expected) ** 2 / expected).sum() - 999) < 5 * 44.7
    for lag in (1, 2, 100):
        assert abs(np.corrcoef(image[:-lag], image[lag:])[0, 1]) < 5 * count**-0.5
    steps = np.histogram((image[1:] - image[:-1]) % 1, bins=100, range=(0, 1))[0]
    assert abs(((steps - steps.mean()) ** 2 / steps.mean()).sum() - 99) < 5 * 14.1


@pytest.mark.parametrize("size", [2**20, 2**32])
def test_a_bit_of_seed_epoch_or_index_changes_half_of_the_bits(size):
    """Avalanche: over 400 indices each of the bits of the image flips in half of the cases (deviation 0.025)."""
    bits = size.bit_length() - 1
    indices = np.random.default_rng(0).integers(size, size=400)

    def flips(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return (((first ^ second)[:, None] >> np.arange(bits)) & 1).mean(0)

    image = KeyedPermutation(size, (5, 0))(indices)
    shares = [flips(image, KeyedPermutation(size, (5 ^ 1 << bit, 0))(indices)) for bit in (0, 1, 13, 40)]
    shares += [flips(image, KeyedPermutation(size, (5, 1 << bit))(indices)) for bit in (0, 1, 7)]
    shares += [flips(image, KeyedPermutation(size, (5, 0))(indices ^ 1 << bit)) for bit in (0, 1, bits // 2, bits - 1)]
    assert np.abs(np.array(shares) - 0.5).max() < 5 * 0.025


def source(folder, num_tokens: int, seq_length: int, seed: int = 0) -> TokenSource:
    with IndexedWriter(folder / "x", 60_000) as writer:
        writer.add_document(np.arange(num_tokens))
    return TokenSource(IndexedDataset(folder / "x"), seq_length, seed)


def test_an_epoch_holds_every_block_once(tmp_path):
    tokens = source(tmp_path, num_tokens=101, seq_length=10)
    assert tokens.samples_per_epoch == 10
    for epoch in range(3):
        samples = [tokens.sample(epoch * 10 + i).tolist() for i in range(10)]
        assert sorted(samples) == [list(range(start, start + 11)) for start in range(0, 100, 10)]


def test_one_token_less_is_one_block_less(tmp_path):
    assert source(tmp_path, num_tokens=100, seq_length=10).samples_per_epoch == 9


def test_epochs_and_seeds_differ(tmp_path):
    tokens = source(tmp_path, num_tokens=1001, seq_length=10)
    orders = [[tokens.block(epoch * 100 + i) for i in range(100)] for epoch in range(2)]
    orders.append([source(tmp_path, 1001, 10, seed=1).block(i) for i in range(100)])
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize("num_tokens", [0, 1, 10])
def test_too_few_tokens(tmp_path, num_tokens):
    with pytest.raises(DataError, match=rf"x\.bin: has {num_tokens} tokens, one sample needs 11"):
        source(tmp_path, num_tokens, seq_length=10)
