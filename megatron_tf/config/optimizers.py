"""The optimizers by the name that `optimizer.type` gives. `optimizers.base` says what each must provide."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_tf.registry import Registry

if TYPE_CHECKING:
    from megatron_tf.config.sections.optimizer import Optimizer
    from megatron_tf.optimizers.base import UpdateRule

DEFAULT = "adamw"
OPTIMIZERS: Registry[UpdateRule] = Registry(
    {
        DEFAULT: "megatron_tf.optimizers.adamw:ADAMW",
        "adamw_ema": "megatron_tf.optimizers.adamw_ema:ADAMW_EMA",
        "muon": "megatron_tf.optimizers.muon:MUON",
    }
)


def rule_of(optimizer: Optimizer) -> UpdateRule:
    """The optimizer that the section names."""
    return OPTIMIZERS[optimizer.type]
