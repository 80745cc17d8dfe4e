"""AdamW that also keeps an exponential moving average of the weights.

    ema ← d·ema + (1 − d)·w          after each update of the weight w, with ema = w in the beginning

The state is the offset o = ema − w. It is 0 for elements that were never updated, such as those of a token that growth
has just added, and it scales with the weight. An update from w to w' makes it o' = d·(o + w − w').
"""

from __future__ import annotations

from typing import Literal

from megatron_tf.config.fields import Beta
from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.optimizers.adamw import AdamW, AdamWOptimizer
from megatron_tf.optimizers.base import OptimizerState, UpdateBatch

EMA_OFFSET = "ema_offset"


class AdamWEmaOptimizer(AdamWOptimizer):
    type: Literal["adamw_ema"] = "adamw_ema"  # type: ignore[assignment]
    """How parameters are updated: AdamW, with an average of the weights."""
    ema_decay: Beta = 0.999
    """The decay rate d of the average."""


class AdamWEma(AdamW):
    section = AdamWEmaOptimizer
    # gradient_power −1: when weights are multiplied by f, so are offsets
    states = (*AdamW.states, OptimizerState(EMA_OFFSET, gradient_power=-1))
    why_not_elsewhere = "it keeps no average of the weights"

    def update(self, optimizer: Optimizer, batch: UpdateBatch, lr: float, weight_decay: float) -> None:
        assert isinstance(optimizer, AdamWEmaOptimizer), optimizer.type
        offsets = batch.states[EMA_OFFSET]
        for offset, weight in zip(offsets, batch.weights, strict=True):
            offset.add_(weight)
        super().update(optimizer, batch, lr, weight_decay)
        for offset, weight in zip(offsets, batch.weights, strict=True):
            offset.sub_(weight).mul_(optimizer.ema_decay)


ADAMW_EMA = AdamWEma()
