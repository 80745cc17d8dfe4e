"""The activations of the package. `passes` were counted in the running model; tests count them again."""

from __future__ import annotations

from math import sqrt

from megatron_tf.activations.base import Activation
from megatron_tf.architectures.work import Passes

_EVERYWHERE = frozenset({"official", "huggingface"})

# S = GELU(τA/‖A‖₂). A score of 0 adds nothing to ‖A‖₂, and GELU(0) = 0.
L2_NORM_GELU = Activation(
    function="megatron_tf.activations.l2_norm_gelu:L2NormGelu",
    default_scale=sqrt,
    passes=Passes(5, 17),
    kernel_passes=Passes(3, 7),
    gram_saves=Passes(1, 3),
    formats=_EVERYWHERE,
    ignores_zero=True,
    scales_normed_scores=True,
)

# S = τG/‖G‖₂ with G = GELU(A). A score of 0 has G = 0. ‖G‖₂² is not a quadratic form in x, so there is no Gram form.
GELU_L2_NORM = Activation(
    function="megatron_tf.activations.gelu_l2_norm:GeluL2Norm",
    default_scale=sqrt,
    passes=Passes(7, 20),
    formats=_EVERYWHERE,
    ignores_zero=True,
    proportional_to_scale=True,
)

# S = τ exp(A)/Σexp(A). Two reductions over ranks: the sum needs the largest score first, so that it cannot overflow.
SOFTMAX = Activation(
    function="megatron_tf.activations.softmax:Softmax",
    default_scale=float,
    passes=Passes(23, 45),
    reductions=2,
    formats=_EVERYWHERE,
    proportional_to_scale=True,
    refusals={
        "zero_key": "a zero key has the weight exp(0) = 1, not 0",
        "gram": "a new token takes the share exp(A) > 0 of the sum, whatever its key is",
    },
)
