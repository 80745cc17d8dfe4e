"""What Pattention does between its products: θ and its gradient, row by row of the scores A [rows, n].

    r = statistic(A),   S = θ(A),   and from dS:   D,   T = Σ of it,   dA

Sharded over the tokens, A holds this rank's columns: r is reduced over the group, T is summed over it, and all else is
local. Both are one number a row. D and then dA take the place of dS, so the backward needs no memory beyond dS and S.
A row whose r is 0 has S = 0 and dA = 0, never NaN, where the formula divides by r.
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
    """θ of one activation, without state. All tensors of scores are [rows, n] with any distance between rows, r and T
    [rows, 1].

    For pruning, the normaliser of a row is (ΣE)^`normaliser_power` up to a factor, with one E ≥ 0 a token.
    """

    normaliser_power: ClassVar[float]

    def __init__(self, facts: Activation):
        self.facts = facts

    @abstractmethod
    def statistic(self, scores: Tensor) -> Tensor:
        """r over the columns that are here, at least fp32."""

    @abstractmethod
    def combine(self, parts: Tensor) -> Tensor:
        """Statistics of parts of the rows, [rows, parts] -> r [rows, 1]."""

    @abstractmethod
    def begin_reduction(self, local: Tensor, group: Group) -> Callable[[], Tensor]:
        """Statistics [rows, any] over this rank's columns -> a function that waits for those over the group's."""

    @abstractmethod
    def weights(self, scores: Tensor, r: Tensor, scale: float) -> Tensor:
        """S, in the type of the scores."""

    @abstractmethod
    def backward(self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(S, T); `gradient` is dS and becomes D."""

    @abstractmethod
    def couple(self, scores: Tensor, r: Tensor, total: Tensor, gradient: Tensor, scale: float) -> None:
        """`gradient` is D and becomes dA; `total`: T over all tokens."""

    @abstractmethod
    def energies(self, scores: Tensor, r: Tensor) -> Tensor:
        """E, up to a factor of each row."""

    @abstractmethod
    def response(self, scores: Tensor, r: Tensor, scale: float) -> Tensor:
        """dS/d log τ at a given r."""

    def statistic_and_weights(self, scores: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(r, S) where the rows are whole."""
        r = self.statistic(scores)
        return r, self.weights(scores, r, scale)

    def backward_and_couple(self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float) -> Tensor:
        """S, where the rows are whole; `gradient` is dS and becomes dA."""
        s, total = self.backward(scores, r, gradient, scale)
        self.couple(scores, r, total, gradient, scale)
        return s

    def backward_with_product(
        self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(S, T, P) as `backward` makes them, and P = ΣdS∘S, the gradient of a factor on the row's S."""
        product = (gradient * self.weights(scores, r, scale)).sum(-1, keepdim=True, dtype=r.dtype)
        return *self.backward(scores, r, gradient, scale), product


_MADE: dict[str, ScoreFunction] = {}


def score_function(activation: str) -> ScoreFunction:
    """What computes the activation of this name."""
    _make(activation)
    return _MADE[activation]


# torch.compile can trace the lookup of an object, but not the import that may come before it
@constant_when_compiled
def _make(activation: str) -> None:
    facts = ACTIVATIONS[activation]
    if activation not in _MADE or _MADE[activation].facts is not facts:
        _MADE[activation] = resolve_name(facts.function)(facts)


def accumulating(scores: Tensor) -> torch.dtype:
    """The type in which sums over a row of scores are made."""
    return torch.promote_types(scores.dtype, torch.float32)
