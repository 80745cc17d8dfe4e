"""Activations whose statistic is an L2 norm over the tokens: of the scores themselves, or of a function of them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megatron_tf.activations.function import ScoreFunction, accumulating
from megatron_tf.parallel.collectives import begin_all_reduce
from megatron_tf.parallel.groups import Group

# Norms up to this count as 0: their squares, by which a gradient is divided, are at the end of fp32's range. The C and
# Triton kernels have the same number.
LEAST = 1e-16


class L2Statistic(ScoreFunction):
    """r is an L2 norm over the tokens."""

    normaliser_power = 0.5

    def combine(self, parts: Tensor) -> Tensor:
        return norm(parts)

    def begin_reduction(self, local: Tensor, group: Group) -> Callable[[], Tensor]:
        return begin_reduction(local, group)


class NormedScores(L2Statistic):
    """r = √ΣA² and S = φ(U) with U = τA/r, where φ is applied to each element.

    | D from dS | T | dA |
    |---|---|---|
    | τ/r · dS∘φ'(U) | ΣD∘A | D − A·T/r² |
    """

    @abstractmethod
    def apply_(self, u: Tensor) -> Tensor:
        """φ(U), in place."""

    @abstractmethod
    def differentiate_(self, gradient: Tensor, u: Tensor) -> Tensor:
        """`gradient` times φ'(U), in the memory of `gradient`."""

    def statistic(self, scores: Tensor) -> Tensor:
        return norm(scores)

    def weights(self, scores: Tensor, r: Tensor, scale: float) -> Tensor:
        return self.apply_(scores * inverse(r, scale).to(scores.dtype))

    def backward(self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        factor = inverse(r, scale).to(scores.dtype)
        u = scores * factor
        self.differentiate_(gradient, u).mul_(factor)
        return self.apply_(u), (gradient * scores).sum(-1, keepdim=True, dtype=r.dtype)

    def couple(self, scores: Tensor, r: Tensor, total: Tensor, gradient: Tensor, scale: float) -> None:
        gradient.addcmul_(scores, coupling(total, r).to(scores.dtype), value=-1)

    def energies(self, scores: Tensor, r: Tensor) -> Tensor:
        return scores.square()

    def response(self, scores: Tensor, r: Tensor, scale: float) -> Tensor:
        u = scores * inverse(r, scale).to(scores.dtype)
        return self.differentiate_(u.clone(), u)


def norm(scores: Tensor) -> Tensor:
    """√ΣA² over the local columns: [rows, 1], at least fp32."""
    return torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=accumulating(scores))


def begin_reduction(local: Tensor, group: Group) -> Callable[[], Tensor]:
    """Starts to sum the squares of norms over this rank's columns. Returns a function that waits for the norms over the
    columns of the whole group."""
    if group.size == 1:
        return lambda: local
    finish = begin_all_reduce(local.square(), group)
    return lambda: finish().sqrt()


def inverse(r: Tensor, scale: float) -> Tensor:
    """τ/r; 0 where r is at most LEAST, and NaN where the sum of squares has overflowed, so that divergence is seen."""
    # in few kernels, between which a GPU would wait: r − r is 0, or NaN where r is not finite
    return torch.add(r - r, functional.threshold(r, LEAST, math.inf).reciprocal(), alpha=scale)


def coupling(total: Tensor, r: Tensor) -> Tensor:
    """T/r², and 0 where r is at most LEAST."""
    return total / functional.threshold(r, LEAST, math.inf).square()
