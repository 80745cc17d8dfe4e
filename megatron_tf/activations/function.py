"""The steps of Pattention between its products: θ and its gradient, for each row of the scores A [rows, n].

    r = statistic(A),   S = θ(A),   and from dS:   D,   T = a sum over the row with D,   dA

Sharded over the tokens, A holds this rank's columns: r is reduced over the group, T is summed over it, and everything
else is local. r and T are one number a row. D and then dA overwrite dS, so the backward needs no memory beyond dS and
S. Where the formula divides by r, a row of zeros, or of numbers whose squares are lost, has S = 0 and dA = 0, and one
whose squares overflow has NaN.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pkgutil import resolve_name
from typing import ClassVar

import torch
from torch import Tensor

from megatron_tf.activations.base import Activation
from megatron_tf.compiling import constant_when_compiled
from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.parallel.groups import Group


class ScoreFunction(ABC):
    """θ of one activation, without state. Scores and tensors of their shape are [rows, n] with any stride between rows,
    r and T are [rows, 1].

    `normaliser_power`: for pruning. θ divides by (ΣE)^`normaliser_power`, up to a factor, where each token has an
        energy E ≥ 0, see `energies`.
    """

    normaliser_power: ClassVar[float]

    def __init__(self, facts: Activation):
        self.facts = facts

    @abstractmethod
    def statistic(self, scores: Tensor) -> Tensor:
        """r over the local columns: [rows, 1], at least fp32."""

    @abstractmethod
    def combine(self, parts: Tensor) -> Tensor:
        """Statistics of disjoint groups of columns [rows, parts] -> r over all of them [rows, 1]."""

    @abstractmethod
    def begin_reduction(self, local: Tensor, group: Group) -> Callable[[], Tensor]:
        """Starts to reduce statistics [rows, any] over the group. Returns a function that waits for the result.

        `local`: over this rank's columns.
        """

    @abstractmethod
    def weights(self, scores: Tensor, r: Tensor, scale: float) -> Tensor:
        """S [rows, n], in the type of the scores."""

    @abstractmethod
    def backward(self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(S, this rank's T); `gradient` is dS and becomes D."""

    @abstractmethod
    def couple(self, scores: Tensor, r: Tensor, total: Tensor, gradient: Tensor, scale: float) -> None:
        """`gradient` is D and becomes dA; `total`: T over all tokens."""

    @abstractmethod
    def energies(self, scores: Tensor, r: Tensor) -> Tensor:
        """E [rows, n], up to a factor for each row."""

    @abstractmethod
    def response(self, scores: Tensor, r: Tensor, scale: float) -> Tensor:
        """dS/d log τ at the given r, [rows, n]."""

    def statistic_and_weights(self, scores: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(r, S) of scores that hold all columns of their rows."""
        r = self.statistic(scores)
        return r, self.weights(scores, r, scale)

    def backward_and_couple(self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float) -> Tensor:
        """S, of scores that hold all columns of their rows; `gradient` is dS and becomes dA."""
        s, total = self.backward(scores, r, gradient, scale)
        self.couple(scores, r, total, gradient, scale)
        return s

    def backward_with_product(
        self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(S, T, P): as `backward`, and P = ΣdS∘S [rows, 1], the gradient of a factor on S of the row."""
        product = (gradient * self.weights(scores, r, scale)).sum(-1, keepdim=True, dtype=r.dtype)
        return *self.backward(scores, r, gradient, scale), product


_MADE: dict[str, ScoreFunction] = {}


def score_function(activation: str) -> ScoreFunction:
    """The object that computes the activation of this name."""
    _make(activation)
    return _MADE[activation]


# torch.compile can trace a lookup in `_MADE`, but not the import that the first call makes.
@constant_when_compiled
def _make(activation: str) -> None:
    facts = ACTIVATIONS[activation]
    if activation not in _MADE or _MADE[activation].facts is not facts:
        _MADE[activation] = resolve_name(facts.function)(facts)


def accumulating(scores: Tensor) -> torch.dtype:
    """The type in which sums over a row of scores are computed: at least fp32."""
    return torch.promote_types(scores.dtype, torch.float32)
