"""The steps of sparse Pattention over the pairs of one projection: products, and the passes between them.

`AtOnce`, on a GPU in bf16: one grouped product and one pass for all pairs. A product reads its sizes on the device, so
nothing waits for the host, and no shape depends on the choices; products with rows of x or of gradients read them where
they are. There the host is the limit, so each step is as few kernels as possible.

`ByCandidate`, elsewhere: a product for each candidate that has rows. On a CPU the passes are by candidate as well,
while its scores are in the cache. On a GPU a pass is one kernel for all pairs, except the one that computes D.

Pairs depend on each other only through r and T. These are one number a row; `assignment` spreads them over the pairs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tf.activations.function import ScoreFunction, accumulating
from megatron_tf.model.grouped import Assignment, empty_gradients, pieces
from megatron_tf.model.kernels.gathered_products import gathered_gradients, gathered_scores, grouped_product
from megatron_tf.model.kernels.pair_sums import add_sum_of_pairs, sum_of_pairs


class Weighted(NamedTuple):
    """The first half of a backward pass.

    `d`: D [pairs, g].  `totals`: T of this rank's pairs, summed over the slots [rows, 1].  `products`: ΣdS∘S [rows,
    slots].  `value_grads`: [slots · m · g, d_out].
    """

    d: Tensor
    totals: Tensor
    products: Tensor
    value_grads: Tensor


class PairSteps(ABC):
    """keys, values: [slots · m · g, width].  `scores`: [pairs, g].  r of pairs: [pairs, 1]."""

    def __init__(self, function: ScoreFunction, assignment: Assignment, scale: float, keys: Tensor, values: Tensor):
        self.function, self.assignment, self.scale = function, assignment, scale
        self.keys, self.values = keys, values

    @abstractmethod
    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [rows, d_in] -> (scores, their statistics in each slot [rows, slots])."""

    @abstractmethod
    def outputs(self, scores: Tensor, of_pairs: Tensor, total: Tensor | None) -> Tensor:
        """[rows, d_out], in the memory of `total` and added to it if there is one.  of_pairs: r of pairs."""

    @abstractmethod
    def to_weights(self, scores: Tensor, of_pairs: Tensor, grad: Tensor) -> Weighted:
        """`grad`: of the outputs, [rows, d_out]."""

    @abstractmethod
    def to_keys_and_inputs(
        self, scores: Tensor, of_pairs: Tensor, d: Tensor, total: Tensor, x: Tensor, d_x: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(gradient of the keys, gradient of x in the memory of `d_x` and added to it if there is one).

        D becomes dA.  total: T over all ranks [rows, 1].
        """


class AtOnce(PairSteps):
    def __init__(self, function: ScoreFunction, assignment: Assignment, scale: float, keys: Tensor, values: Tensor):
        super().__init__(function, assignment, scale, keys, values)
        self.ends = assignment.ends.view(-1)
        groups = len(self.ends)
        self.keys, self.values = (tokens.view(groups, -1, tokens.shape[1]) for tokens in (keys, values))

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = gathered_scores(x, self.assignment.rows, self.keys, self.ends)
        return scores, self.assignment.by_row(self.function.statistic(scores))

    def outputs(self, scores: Tensor, of_pairs: Tensor, total: Tensor | None) -> Tensor:
        s = self.function.weights(scores, of_pairs, self.scale)
        return self._sum(grouped_product(s, self.values, self.ends), total)

    def to_weights(self, scores: Tensor, of_pairs: Tensor, grad: Tensor) -> Weighted:
        d = gathered_scores(grad, self.assignment.rows, self.values, self.ends)
        s, totals, products = self.function.backward_with_product(scores, of_pairs, d, self.scale)
        value_grads = gathered_gradients(s, self.assignment.rows, grad, self.ends).flatten(0, 1)
        return Weighted(d, self._sum(totals, None), self.assignment.by_row(products), value_grads)

    def to_keys_and_inputs(
        self, scores: Tensor, of_pairs: Tensor, d: Tensor, total: Tensor, x: Tensor, d_x: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        self.function.couple(scores, of_pairs, self.assignment.by_pair(total), d, self.scale)
        key_grads = gathered_gradients(d, self.assignment.rows, x, self.ends).flatten(0, 1)
        return key_grads, self._sum(grouped_product(d, self.keys, self.ends), d_x)

    def _sum(self, of_pairs: Tensor, total: Tensor | None) -> Tensor:
        if total is None:
            return sum_of_pairs(of_pairs, self.assignment.places)
        add_sum_of_pairs(of_pairs, self.assignment.places, total)
        return total


class ByCandidate(PairSteps):
    def __init__(self, function: ScoreFunction, assignment: Assignment, scale: float, keys: Tensor, values: Tensor):
        super().__init__(function, assignment, scale, keys, values)
        self.keys, self.values = (tokens.view(*assignment.ends.shape, -1, tokens.shape[1]) for tokens in (keys, values))

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        num_pairs, room = self.assignment.num_pairs, torch.empty_like(x)
        scores = x.new_empty(num_pairs, self.keys.shape[2])
        statistics = scores.new_empty(num_pairs, 1, dtype=accumulating(scores))
        for piece in pieces(self.assignment, self.keys):
            own = scores[piece.pairs]
            piece.scores(piece.inputs(x, room), self.keys, own)
            if not x.is_cuda:
                statistics[piece.pairs] = self.function.statistic(own)
        if x.is_cuda:
            statistics = self.function.statistic(scores)
        return scores, self.assignment.by_row(statistics)

    def outputs(self, scores: Tensor, of_pairs: Tensor, total: Tensor | None) -> Tensor:
        shape = len(self.assignment.places), self.values.shape[3]
        out, room = _widened(total, shape, scores), scores.new_empty(shape)
        s = self.function.weights(scores, of_pairs, self.scale) if scores.is_cuda else None
        for piece in pieces(self.assignment, self.values):
            part = piece.pairs
            own = self.function.weights(scores[part], of_pairs[part], self.scale) if s is None else s[part]
            piece.add_outputs(own, self.values, out, room)
        return _rounded(out, total, scores.dtype)

    def to_weights(self, scores: Tensor, of_pairs: Tensor, grad: Tensor) -> Weighted:
        d, value_grads = torch.empty_like(scores), empty_gradients(self.values, self.assignment)
        totals, products, room = torch.empty_like(of_pairs), torch.empty_like(of_pairs), torch.empty_like(grad)
        for piece in pieces(self.assignment, self.values):
            part, own_d, own_grad = piece.pairs, d[piece.pairs], piece.inputs(grad, room)
            piece.scores(own_grad, self.values, own_d)
            s, totals[part], products[part] = self.function.backward_with_product(
                scores[part], of_pairs[part], own_d, self.scale
            )
            piece.gradients(s, own_grad, value_grads)
        by_row = self.assignment.by_row
        return Weighted(d, by_row(totals).sum(-1, keepdim=True), by_row(products), value_grads.flatten(0, 2))

    def to_keys_and_inputs(
        self, scores: Tensor, of_pairs: Tensor, d: Tensor, total: Tensor, x: Tensor, d_x: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out = _widened(d_x, x.shape, d)
        of_total, key_grads = self.assignment.by_pair(total), empty_gradients(self.keys, self.assignment)
        inputs, room = torch.empty_like(x), torch.empty_like(x)
        if x.is_cuda:
            self.function.couple(scores, of_pairs, of_total, d, self.scale)
        for piece in pieces(self.assignment, self.keys):
            part, own_d = piece.pairs, d[piece.pairs]
            if not x.is_cuda:
                self.function.couple(scores[part], of_pairs[part], of_total[part], own_d, self.scale)
            piece.gradients(own_d, piece.inputs(x, inputs), key_grads)
            piece.add_outputs(own_d, self.keys, out, room)
        return key_grads.flatten(0, 2), _rounded(out, d_x, d.dtype)


def _widened(total: Tensor | None, shape: Sequence[int], scores: Tensor) -> Tensor:
    """What slots are added to, in at least fp32: `total`, or zeros of this shape. A sum in 16 bits would round at every
    slot."""
    dtype = accumulating(scores)
    return scores.new_zeros(shape, dtype=dtype) if total is None else total.to(dtype)


def _rounded(out: Tensor, total: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`out` in `dtype`, in the memory of `total` if there is one."""
    if out.dtype == dtype:
        return out
    return out.to(dtype) if total is None else total.copy_(out)
