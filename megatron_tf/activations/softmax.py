"""`softmax`: ordinary attention to the parameter tokens, times τ.

| r | S | D from dS | T | dA |
|---|---|---|---|---|
| log Σexp(A) | τ·exp(A − r) | dS | ΣD∘S | S∘(D − T/τ) |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.activations.function import ScoreFunction, accumulating
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import Group


class Softmax(ScoreFunction):
    normaliser_power = 1.0

    def statistic(self, scores: Tensor) -> Tensor:
        return torch.logsumexp(scores.to(accumulating(scores)), -1, keepdim=True)

    def combine(self, parts: Tensor) -> Tensor:
        return torch.logsumexp(parts, -1, keepdim=True)

    def begin_reduction(self, local: Tensor, group: Group) -> Callable[[], Tensor]:
        """Two blocking all-reduces: the maximum first, so that the sum of exponentials cannot overflow."""
        if group.size == 1:
            return lambda: local
        top = all_reduce(local, group, dist.ReduceOp.MAX)
        total = top + all_reduce((local - top).exp(), group).log()
        return lambda: total

    def weights(self, scores: Tensor, r: Tensor, scale: float) -> Tensor:
        return ((scores.to(r.dtype) - r).exp() * scale).to(scores.dtype)

    def backward(self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        s = self.weights(scores, r, scale)
        return s, (gradient * s).sum(-1, keepdim=True, dtype=r.dtype)

    def backward_with_product(
        self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, total = self.backward(scores, r, gradient, scale)
        return s, total, total

    def couple(self, scores: Tensor, r: Tensor, total: Tensor, gradient: Tensor, scale: float) -> None:
        gradient.sub_((total / scale).to(gradient.dtype)).mul_(self.weights(scores, r, scale))

    def energies(self, scores: Tensor, r: Tensor) -> Tensor:
        return (scores - r).exp()

    def response(self, scores: Tensor, r: Tensor, scale: float) -> Tensor:
        return self.weights(scores, r, scale)
