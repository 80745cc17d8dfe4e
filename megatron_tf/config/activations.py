"""The activations by the name that `model.activation` gives. `activations.base` says what is declared of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_tf.registry import Registry

if TYPE_CHECKING:
    from megatron_tf.activations.base import Activation

DEFAULT_ACTIVATION = "l2_norm_gelu"
ACTIVATIONS: Registry[Activation] = Registry(
    {
        "l2_norm_gelu": "megatron_tf.activations.built_in:L2_NORM_GELU",
        "gelu_l2_norm": "megatron_tf.activations.built_in:GELU_L2_NORM",
        "softmax": "megatron_tf.activations.built_in:SOFTMAX",
    }
)
