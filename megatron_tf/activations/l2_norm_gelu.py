"""`l2_norm_gelu`: GELU of the scores after their L2 norm, the form of the TokenFormer paper.

It uses the kernels of `model.kernels` where they can run, and PyTorch's operators elsewhere. Tests compare the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tf.activations.l2_norm import NormedScores
from megatron_tf.model.kernels import fused_passes


class L2NormGelu(NormedScores):
    """φ = GELU."""

    def apply_(self, u: Tensor) -> Tensor:
        return torch.ops.aten.gelu_(u)

    def differentiate_(self, gradient: Tensor, u: Tensor) -> Tensor:
        return torch.ops.aten.gelu_backward.grad_input(gradient, u, grad_input=gradient)

    def statistic(self, scores: Tensor) -> Tensor:
        if fused_passes.usable(scores):
            return fused_passes.norm(scores)
        return super().statistic(scores)

    def weights(self, scores: Tensor, r: Tensor, scale: float) -> Tensor:
        if fused_passes.usable(scores):
            return fused_passes.weights(scores, r, scale)
        return super().weights(scores, r, scale)

    def statistic_and_weights(self, scores: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if fused_passes.usable(scores):
            return fused_passes.norm_and_weights(scores, scale)
        return super().statistic_and_weights(scores, scale)

    def backward(self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if fused_passes.usable(scores):
            return fused_passes.backward(scores, r, gradient, scale)
        return super().backward(scores, r, gradient, scale)

    def backward_with_product(
        self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if fused_passes.usable(scores):
            return fused_passes.backward_with_product(scores, r, gradient, scale)
        return super().backward_with_product(scores, r, gradient, scale)

    def couple(self, scores: Tensor, r: Tensor, total: Tensor, gradient: Tensor, scale: float) -> None:
        if fused_passes.usable(scores):
            fused_passes.couple(scores, r, total, gradient)
        else:
            super().couple(scores, r, total, gradient, scale)

    def backward_and_couple(self, scores: Tensor, r: Tensor, gradient: Tensor, scale: float) -> Tensor:
        if fused_passes.usable(scores):
            return fused_passes.backward_and_couple(scores, r, gradient, scale)
        return super().backward_and_couple(scores, r, gradient, scale)
