"""`gelu_l2_norm`: the L2 norm after GELU.

| r | S | D from dS | T | dA |
|---|---|---|---|---|
| √ΣG², G = GELU(A) | τG/r | τ/r · dS | ΣD∘G | (D − G·T/r²)∘GELU'(A) |
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.activations.l2_norm import L2Statistic, coupling, inverse, norm


class GeluL2Norm(L2Statistic):
    def statistic(self, scores: Tensor) -> Tensor:
        return norm(F.gelu(scores))

    def weights(self, scores: Tensor, r: Tensor, scale: float) -> Tensor:
        return F.gelu(scores) * inverse(r, scale).to(scores.dtype)

    def backward(self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        s = self.weights(scores, r, scale)
        # dS∘S is D∘G, and S is there already.
        total = (gradient * s).sum(-1, keepdim=True, dtype=r.dtype)
        gradient.mul_(inverse(r, scale).to(scores.dtype))
        return s, total

    def backward_with_product(
        self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        s, total = self.backward(scores, r, gradient, scale)
        return s, total, total

    def couple(self, scores: Tensor, r: Tensor, total: Tensor, gradient: Tensor, scale: float) -> None:
        gradient.addcmul_(F.gelu(scores), coupling(total, r).to(scores.dtype), value=-1)
        torch.ops.aten.gelu_backward.grad_input(gradient, scores, grad_input=gradient)

    def energies(self, scores: Tensor, r: Tensor) -> Tensor:
        return F.gelu(scores).square()

    def response(self, scores: Tensor, r: Tensor, scale: float) -> Tensor:
        return self.weights(scores, r, scale)
