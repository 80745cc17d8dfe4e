"""Several token sources as one, in exact proportion to their weights, in closed form.

The sources are the leaves of a binary tree. A node that has been asked for i samples has taken

    left(i) = floor((i·p + u) / q)

of them from its left child and the rest from its right, where p/q is the left child's share of the node's weight and
the phase 0 ≤ u < q comes from the seed. Sample i is a left one when left(i + 1) > left(i), and is then the child's
sample left(i), else sample i - left(i) of the right child. So every source is consumed 0, 1, 2, ... without a gap.

Over any window of m samples of a node, the left child gets within one of m·p/q, at most 1 - 1/q off. Down the tree, a
leaf of weight w is off by at most the sum of (1 - 1/q)·w/v over the nodes v on its path (without the root), q being
that of the split above v. With two sources this is below one sample over any window, anywhere. The tree is Huffman's:
weights grow along the path to the root at least like Fibonacci's numbers, so the sum is below
1 + 1 + 1/2 + 1/3 + 1/5 + ... < 3.4, however many sources there are.

No order whatever keeps three or more sources below one over every window: for weights 5 : 3 : 2 every sequence fails
within eight samples. The least that can be promised for all weights is below two (R. Tijdeman, "The chairman assignment
problem", 1980), by a sequence that has to be walked from its beginning; this one is known at any place in O(sources).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from megatron_tf.data.samples import TokenSource, derived_seed

MAX_DEVIATION = 3.4  # samples a source may be off its share, over any window


@dataclass(frozen=True)
class Split:
    """An inner node; a child is a node or the number of a source."""

    left: Split | int
    right: Split | int
    numerator: int  # p
    denominator: int  # q
    phase: int  # u


class Shares:
    """Which source each sample is of: a function of (weights, seed, number of the sample), found in O(sources)."""

    def __init__(self, weights: Sequence[float], seed: int):
        """`weights`: positive, relative to one another, read as the decimal number they print as."""
        assert weights and all(weight > 0 for weight in weights)
        self._tree = _huffman_tree([Fraction(str(weight)) for weight in weights], seed)

    def locate(self, index: int) -> tuple[int, int]:
        """(number of the source, sample index within it) of sample `index` ≥ 0."""
        assert index >= 0, index
        node = self._tree
        while isinstance(node, Split):
            taken = (index * node.numerator + node.phase) // node.denominator
            taken_next = ((index + 1) * node.numerator + node.phase) // node.denominator
            node, index = (node.left, taken) if taken_next > taken else (node.right, index - taken)
        return node, index


class Blend(Shares):
    """Endless samples of the tokens of all sources."""

    def __init__(self, sources: Sequence[TokenSource], weights: Sequence[float], seed: int):
        assert len(sources) == len(weights)
        super().__init__(weights, seed)
        self.sources = tuple(sources)
        self.seq_length = sources[0].seq_length
        assert all(source.seq_length == self.seq_length for source in sources)

    def first_tokens(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(number of the source, place in it of the first token) of each sample, both int64 [n]."""
        located = np.array([self.locate(index) for index in indices], dtype=np.int64).reshape(-1, 2)
        numbers, within = located[:, 0], located[:, 1]
        tokens = np.empty_like(within)
        for number in np.unique(numbers):
            chosen = numbers == number
            tokens[chosen] = self.sources[number].first_tokens(within[chosen])
        return numbers, tokens

    def sample(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1]."""
        source, within = self.locate(index)
        return self.sources[source].sample(within)


def _huffman_tree(weights: list[Fraction], seed: int) -> Split | int:
    """Join the two lightest nodes until one is left; equal weights in the order of the sources."""
    heap: list[tuple[Fraction, int, Split | int]] = [(weight, number, number) for number, weight in enumerate(weights)]
    heapq.heapify(heap)
    order = len(weights)  # unique, so that the heap never compares nodes
    while len(heap) > 1:
        left_weight, _, left = heapq.heappop(heap)
        right_weight, _, right = heapq.heappop(heap)
        share = left_weight / (left_weight + right_weight)
        phase = derived_seed(seed, order) % share.denominator
        split = Split(left, right, share.numerator, share.denominator, phase)
        heapq.heappush(heap, (left_weight + right_weight, order, split))
        order += 1
    return heap[0][2]
