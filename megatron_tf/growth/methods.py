"""Growth methods: what the new parameter tokens of one Pattention are, and its τ afterwards.

A method is a function from `Projection` to `NewTokens`, registered in METHODS under its name in the configuration. It
sees logical, unsharded state by range, so it works at every layout and holds no whole tensor. It decides at once and
computes elements only when they are read, so whether a growth is possible is known before any state is, and without torch.

In the formulas A = X Kᵀ are the scores, K and R the old and the new key tokens, n_old and n_new the numbers of tokens
before and after, τ and τ' the stored scale of the projection before and after.

| method | new keys | new values | τ' | keeps the function |
|---|---|---|---|---|
| `zero_key` | 0 | random | τ | both L2 forms, exactly |
| `gram`, l2_norm_gelu | R with RᵀR = (τ'²/τ² − 1) KᵀK | 0 | √n_new | to rounding |
| `gram`, gelu_l2_norm | 0, and old values times τ/τ' | random | √n_new | to rounding |
| `random` | random | random | √n_new (n_new for softmax) | no |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from megatron_tf.checks import check_scale, check_whole_number
from megatron_tf.config.schema import Activation
from megatron_tf.errors import ConfigError
from megatron_tf.state.parameters import check_activation, default_scale

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tf.growth.gram import GramKeys

# (start, stop) in elements of a flattened tensor -> flat values on the CPU
Elements = Callable[[int, int], "Tensor"]


@dataclass(frozen=True)
class Projection:
    """One Pattention about to grow.

    `name`: such as "blocks.0.ffn".  `kind`: its token count's name in model.parameter_tokens.
    `key`: where the configuration chose the method, for messages.
    `width`: elements of a token.  `scale`: τ before.  `seed`: of this growth.
    `old_keys`: range of each smaller key tensor, by its name in the projection (a Pattention has one, "key_tokens").
    `initial_keys`, `initial_values`: what the normal initialiser puts into a range of each grown tensor.
    """

    name: str
    kind: str
    key: str
    activation: Activation
    width: int
    old_tokens: int
    new_tokens: int
    scale: float
    seed: int
    old_keys: Mapping[str, Elements]
    initial_keys: Mapping[str, Elements]
    initial_values: Mapping[str, Elements]

    def __post_init__(self) -> None:
        check_activation(self.activation)
        check_whole_number("old_tokens", self.old_tokens, 1)
        check_whole_number("new_tokens", self.new_tokens, self.old_tokens + 1)
        check_scale("scale", self.scale)

    @property
    def default_scale(self) -> float:
        """τ of a model of the new size that was never grown, the one that the official code assumes."""
        return default_scale(self.new_tokens, self.activation)


@dataclass(frozen=True)
class NewTokens:
    """What a method decides. ConfigError when the new tokens would be dead.

    `scale`: τ afterwards.  `keys`, `values`: the new rows of each key and value tensor, by range of the grown tensor; None
    is zeros in all of them.
    `old_values_factor`: the old value tokens are multiplied by it.
    """

    scale: float
    keys: Mapping[str, Elements] | None
    values: Mapping[str, Elements] | None
    old_values_factor: float = 1.0

    def elements(self, tensor: str) -> Elements | None:
        """The new rows of the key or value tensor of this name; None is zeros."""
        return {**(self.keys or {}), **(self.values or {})}.get(tensor)

    def __post_init__(self) -> None:
        if self.keys is None and self.values is None:
            raise ConfigError(
                "growth.method: new tokens with key 0 and value 0 are refused: both their gradients are 0, so they "
                "would never learn anything."
            )


def zero_key(projection: Projection) -> NewTokens:
    """New keys 0, new values random, τ held: keeps the function exactly, to the last bit in exact arithmetic.

    A new key k = 0 has the score x·k = 0 at every position.
    `l2_norm_gelu`: out = Σ_i GELU(τ A_i / ‖A‖) v_i. The zeros leave ‖A‖ = √ΣA² as it is, and with τ held every old
        term too; a new term is GELU(0) v = 0.
    `gelu_l2_norm`: out = τ/‖G‖ Σ_i G_i v_i with G = GELU(A). A new G is GELU(0) = 0, so ‖G‖ and, with τ held, every old
        term stay as they are. Old values are *not* rescaled: the factor √(n_old/n_new) on them that is known for this
        form makes up for τ moving from √n_old to √n_new (see `gram`), which it does not do here.
    `softmax`: out = τ Σ_i exp(A_i) v_i / Σ exp(A). exp(0) = 1 enters the sum, whatever τ is: refused.

    In the first step the new values get no gradient (their weight is 0) but the new keys do, since the values are
    not 0; with both 0 the token would be dead for ever.
    """
    if projection.activation == "softmax":
        raise ConfigError(
            f"{projection.key}: zero_key cannot keep the function of a softmax model: a zero key has the "
            f"weight exp(0) = 1, not 0. {_OTHER_ACTIVATION}"
        )
    return NewTokens(projection.scale, keys=None, values=projection.initial_values)


def gram(projection: Projection) -> NewTokens:
    """τ' = √n_new, as the official code computes it, so that this code loads the grown model and keeps its function.

    `l2_norm_gelu`: out = Σ_i GELU(τ A_i / ‖A‖) v_i. The new tokens have value 0, so only ‖A‖ feels them:
        ‖A'‖² = xᵀ(KᵀK + RᵀR)x = τ'²/τ² ‖A‖²  when  RᵀR = (τ'²/τ² − 1) KᵀK,  and so τ'/‖A'‖ = τ/‖A‖.
        For τ = √n_old the factor is n_new/n_old − 1; for a τ held by an earlier `zero_key` it is larger. R is a random
        orthonormal mixing of the square root of the Gram matrix, see `GramKeys`: new directions, not copies. That
        takes as many new tokens as KᵀK has rank: min(n_old, width). The new values learn at once.
    `gelu_l2_norm`: no R does this, since ‖GELU(A)‖² is not a quadratic form of x. The same end is reached with new keys
        0 and old values times τ/τ', which makes up for τ; new values random.
    `softmax`: every new token takes a share exp(A) > 0 of the sum, and that share depends on x: refused.
    """
    scale, old, new = projection.default_scale, projection.old_tokens, projection.new_tokens
    if projection.activation == "softmax":
        raise ConfigError(
            f"{projection.key}: gram cannot keep the function of a softmax model: a new token takes the share exp(A) "
            f"> 0 of the sum, whatever its key is. {_OTHER_ACTIVATION}"
        )
    tensors = (*projection.initial_keys, *projection.initial_values)
    if len(tensors) != 2:
        raise ConfigError(
            f"{projection.key}: gram grows projections of one key and one value tensor, and {projection.name} has "
            f"{len(tensors)} tensors ({', '.join(tensors)}). Set the method to zero_key."
        )
    if projection.activation == "gelu_l2_norm":
        return NewTokens(scale, None, projection.initial_values, old_values_factor=projection.scale / scale)
    needed = min(old, projection.width)
    if new - old < needed:
        raise ConfigError(
            f"{projection.key}: gram needs at least {needed} new {projection.kind} tokens, the lesser of the "
            f"{old} old ones and model.hidden_size {projection.width}; from {old} to {new} they are {new - old}. Set "
            f"model.parameter_tokens.{projection.kind} to at least {old + needed}, or the method to zero_key."
        )
    factor = (scale / projection.scale) ** 2 - 1
    if factor <= 0:
        raise ConfigError(
            f"{projection.key}: gram sets τ of {projection.name} to √{new} = {scale:.6g}, which must be more than the "
            f"{projection.scale:.6g} of now. Set model.parameter_tokens.{projection.kind} to more than "
            f"{projection.scale**2:.0f}, or the method to zero_key."
        )

    ((name, old_keys),) = projection.old_keys.items()

    def read(start: int, stop: int) -> Tensor:
        return keys().read(start, stop)

    @cache
    def keys() -> GramKeys:
        from megatron_tf.growth.gram import GramKeys  # needs torch

        return GramKeys(
            old_keys, old_tokens=old, added_tokens=new - old, width=projection.width, factor=factor,
            seed=projection.seed, name=projection.name,
        )  # fmt: skip

    return NewTokens(scale, {name: read}, values=None)


def random(projection: Projection) -> NewTokens:
    """New keys and values random, τ' = √n_new, as the official code grows: the function changes. For comparison."""
    return NewTokens(projection.default_scale, projection.initial_keys, projection.initial_values)


METHODS: dict[str, Callable[[Projection], NewTokens]] = {"zero_key": zero_key, "gram": gram, "random": random}
PRESERVING = frozenset({"zero_key", "gram"})  # methods that promise to keep the function; without noise they do
_OTHER_ACTIVATION = (
    "Set the method to random, which changes the function, or grow a model of model.activation l2_norm_gelu or "
    "gelu_l2_norm."
)
