"""The tokens of sample i: a keyed permutation of the sequence blocks of a data set, without any stored order."""

from __future__ import annotations

import hashlib
from math import isqrt
from typing import TypeVar

import numpy as np

from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.errors import DataError

Index = TypeVar("Index", int, np.ndarray)

MASK = 2**64 - 1
NUM_ROUNDS = 8


class KeyedPermutation:
    """A bijection on [0, size) chosen by `key`, computed in O(1) time and memory a value.

    A Feistel network over pairs (left, right) with left in [0, a), right in [0, b), a = ceil(sqrt(size)),
    b = ceil(size / a). A round adds a keyed hash of one half to the other, modulo that half's range, which can be
    undone, so the rounds together are a bijection on [0, a·b). The few values at or above `size` (fewer than a) are
    sent through again until they fall below it (cycle walking), which keeps it a bijection on [0, size).
    Reference: Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002.
    """

    def __init__(self, size: int, key: tuple[int, ...]):
        assert 1 <= size < 2**62, size
        self.size = size
        self._left_range = isqrt(size - 1) + 1
        self._right_range = -(-size // self._left_range)
        self._round_keys = [derived_seed(*key, number) for number in range(NUM_ROUNDS)]

    def __call__(self, index: Index) -> Index:
        """Image of an int, or of each entry of an integer array (int64 of the same shape). All in [0, size)."""
        if isinstance(index, np.ndarray):
            assert index.size == 0 or (index.min() >= 0 and index.max() < self.size)
            flat = index.astype(np.uint64).ravel()
            image = self._pass(flat)
            while (outside := image >= self.size).any():
                image[outside] = self._pass(image[outside])
            return image.astype(np.int64).reshape(index.shape)
        assert 0 <= index < self.size, (index, self.size)
        image = self._pass(int(index))
        while image >= self.size:
            image = self._pass(image)
        return image

    def _pass(self, index: Index) -> Index:
        left, right = index // self._right_range, index % self._right_range
        for round_key in self._round_keys[::2]:
            left = (left + mixed(right ^ round_key) % self._left_range) % self._left_range
            right = (right + mixed(left ^ (round_key >> 1)) % self._right_range) % self._right_range
        return left * self._right_range + right


def samples_of_rank(
    first_sample: int, micro_batch_size: int, num_micro_batches: int, data_rank: int, data_size: int
) -> list[int]:
    """The samples of one data-parallel rank in the step that begins at `first_sample`: micro batch m has first_sample +
    (m·data_size + data_rank)·micro_batch_size + [0, micro_batch_size)."""
    size = micro_batch_size
    firsts = (first_sample + (m * data_size + data_rank) * size for m in range(num_micro_batches))
    return [first + row for first in firsts for row in range(size)]


def derived_seed(*parts: int) -> int:
    """A 64-bit number that is a function of the parts; other parts give an unrelated number."""
    text = ",".join(str(int(part)) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "little")


def mixed(value: Index) -> Index:
    """64 bits that depend on all bits of `value` (finaliser of SplitMix64). The mask changes nothing for uint64 arrays,
    which wrap by themselves."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & MASK
    return value ^ (value >> 31)


class TokenSource:
    """Endless shuffled samples of one data set; sample i is a function of (data set, seq_length, seed, i).

    Block j is tokens [j·seq_length, (j + 1)·seq_length + 1): neighbours share one token, so that every token but the
    first is predicted once an epoch, except fewer than seq_length at the end. Each epoch has an order of its own.
    Raises `DataError` when there is not a single block.
    """

    def __init__(self, dataset: IndexedDataset, seq_length: int, seed: int):
        self.dataset = dataset
        self.seq_length = seq_length
        self.seed = seed
        self.samples_per_epoch = (dataset.num_tokens - 1) // seq_length
        if self.samples_per_epoch < 1:
            held_out = ", hold out more of it (--validation-fraction)" if dataset.prefix.endswith("_validation") else ""
            raise DataError(
                f"{dataset.prefix}.bin: has {dataset.num_tokens} tokens, one sample needs {seq_length + 1} "
                f"(model.seq_length + 1). Prepare more text{held_out} or shorten model.seq_length."
            )
        self._newest = 0, KeyedPermutation(self.samples_per_epoch, (seed, 0))  # replaced as a whole: threads read it

    def block(self, index: int) -> int:
        """Block of the data set that sample `index` is; `index` may exceed an epoch."""
        epoch, position = divmod(index, self.samples_per_epoch)
        return self._order(epoch)(position)

    def first_tokens(self, indices: np.ndarray) -> np.ndarray:
        """Place in the data set of each sample's first token; int64 [n] -> int64 [n]. Many at once cost little more."""
        epochs, positions = np.divmod(indices, self.samples_per_epoch)
        blocks = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            blocks[chosen] = self._order(int(epoch))(positions[chosen])
        return blocks * self.seq_length

    def sample(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1]."""
        start = self.block(index) * self.seq_length
        return self.dataset.tokens(start, start + self.seq_length + 1)

    def _order(self, epoch: int) -> KeyedPermutation:
        """Its keys take longer to derive than a value of it takes, so the newest one is kept."""
        newest, order = self._newest
        if newest != epoch:
            order = KeyedPermutation(self.samples_per_epoch, (self.seed, epoch))
            self._newest = epoch, order
        return order
