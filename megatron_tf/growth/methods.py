"""Growth methods: what the new parameter tokens of one Pattention are, and its τ afterwards.

A method is a function from `Projection` to `NewTokens`, registered in METHODS under its name in the configuration. It
sees logical, unsharded state by range, so it works at every layout and holds no whole tensor.

In the formulas A = X Kᵀ are the scores, n the number of tokens, τ the stored scale of the projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tf.config.schema import Activation
from megatron_tf.errors import ConfigError

# (start, stop) in elements of the flattened *grown* tensor, within its new rows -> flat fp32 values
NewElements = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Projection:
    """One Pattention about to grow.

    `scale`: its τ before.  `initial_keys`, `initial_values`: what the normal initialiser puts into the new rows.
    """

    name: str
    activation: Activation
    scale: float
    initial_keys: NewElements
    initial_values: NewElements


@dataclass(frozen=True)
class NewTokens:
    """What a method decides.  `scale`: τ after the growth.  `keys`, `values`: the new rows."""

    scale: float
    keys: NewElements
    values: NewElements


def zero_key(projection: Projection) -> NewTokens:
    """New keys 0, new values random, τ held: keeps the function exactly, to the last bit in exact arithmetic.

    A new key k = 0 has the score x·k = 0 at every position.
    `l2_norm_gelu`: out = Σ_i GELU(τ A_i / ‖A‖) v_i. The zeros leave ‖A‖ = √ΣA² as it is, and with τ held every old
        term too; a new term is GELU(0) v = 0.
    `gelu_l2_norm`: out = τ/‖G‖ Σ_i G_i v_i with G = GELU(A). A new G is GELU(0) = 0, so ‖G‖ and, with τ held, every old
        term stay as they are. Old values are *not* rescaled: the factor √(n_old/n_new) on them that is known for this
        form makes up for τ moving from √n_old to √n_new, which it does not do here; both together would shrink
        the output by that factor.
    `softmax`: out = τ Σ_i exp(A_i) v_i / Σ exp(A). exp(0) = 1 enters the sum, whatever τ is: refused.

    In the first step the new values get no gradient (their weight is 0) but the new keys do, since the values are
    not 0; with both 0 the token would be dead for ever.
    """
    if projection.activation == "softmax":
        raise ConfigError(
            "growth.method: zero_key cannot keep the function of a softmax model: a zero key has the "
            "weight exp(0) = 1, not 0. Grow a model with model.activation l2_norm_gelu or gelu_l2_norm."
        )
    return NewTokens(
        projection.scale, keys=lambda start, stop: torch.zeros(stop - start), values=projection.initial_values
    )


METHODS: dict[str, Callable[[Projection], NewTokens]] = {"zero_key": zero_key}
