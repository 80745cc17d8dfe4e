"""AdamW: decoupled weight decay and bias correction, through torch's own kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megatron_tf.config.fields import Beta, Positive
from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.optimizers.base import OptimizerState, UpdateBatch, UpdateRule

if TYPE_CHECKING:
    import torch


class AdamWOptimizer(Optimizer):
    type: Literal["adamw"] = "adamw"
    """How parameters are updated: AdamW."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of Adam's two moments."""
    eps: Positive = 1e-8
    """Added to the denominator of Adam's update."""


class AdamW(UpdateRule):
    section: ClassVar[type[Optimizer]] = AdamWOptimizer
    states: ClassVar[tuple[OptimizerState, ...]] = (
        OptimizerState("exp_avg", gradient_power=1),
        OptimizerState("exp_avg_sq", gradient_power=2),
    )

    def update(self, optimizer: Optimizer, batch: UpdateBatch, lr: float, weight_decay: float) -> None:
        from torch.optim.adamw import adamw

        settings = as_adamw(optimizer)
        adamw(
            list(batch.weights),
            list(batch.gradients),
            list(batch.states["exp_avg"]),
            list(batch.states["exp_avg_sq"]),
            max_exp_avg_sqs=[],
            state_steps=list(batch.ages),
            fused=True,
            amsgrad=False,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=settings.eps,
            maximize=False,
        )

    def reference(self, optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        from torch.optim import AdamW as TorchAdamW

        settings = as_adamw(optimizer)
        return TorchAdamW(list(groups), lr=settings.lr, betas=settings.betas, eps=settings.eps)


def as_adamw(optimizer: Optimizer) -> AdamWOptimizer:
    """`optimizer` itself, as the type that the caller knows it to have."""
    assert isinstance(optimizer, AdamWOptimizer), optimizer.type
    return optimizer


ADAMW = AdamW()
