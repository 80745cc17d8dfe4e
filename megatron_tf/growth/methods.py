"""Growth methods: the initial values of the new parameter tokens of one Pattention, and its τ afterwards.

A method is a function from `GrowingProjection` to `NewTokens`, registered in METHODS under its name in the
configuration. It sees logical, unsharded state by range, so it works at every layout and holds no whole tensor. It
decides at once and computes elements only when they are read, so whether a growth is possible is known before any
state is, and without torch.

In the formulas A = X Kᵀ are the scores, K and R the old and the new key tokens, n_old and n_new the numbers of tokens
before and after, τ and τ' the stored scale of the projection before and after.

| method | new keys | new values | τ' | keeps the function |
|---|---|---|---|---|
| `zero_key` | 0 | random | τ | exactly |
| `gram`, by keys | R with RᵀR = (τ'²/τ² − 1) KᵀK | 0 | default for n_new | to rounding |
| `gram`, by values | 0, and old values times τ/τ' | random | default for n_new | to rounding |
| `random` | random | random | default for n_new | no |
| `matched` | random, as large as the old | random, all so that outputs keep their variance | with the norm | no |

An activation declares facts about itself (`activations.base.Activation`), and a method checks those that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from megatron_tf.checks import check_scale, check_whole_number
from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.nearest import either
from megatron_tf.errors import ConfigError
from megatron_tf.state.parameters import check_activation, default_scale

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tf.activations.base import Activation
    from megatron_tf.growth.gram import GramKeys

# (start, stop) in elements of a flattened tensor -> flat values on the CPU
Elements = Callable[[int, int], "Tensor"]


@dataclass(frozen=True)
class GrowingProjection:
    """One Pattention about to grow.

    `name`: such as "blocks.0.ffn".  `kind`: its token count's name in model.parameter_tokens.
    `key`: where the configuration chose the method, for messages.
    `width`: elements of a token.  `scale`: τ before.  `seed`: of this growth.
    `old_keys`, `old_values`: range of each smaller tensor, by its name in the projection (a Pattention has one of each,
        "key_tokens" and "value_tokens").
    `initial_keys`, `initial_values`: what the normal initialiser puts into a range of each grown tensor.
    `normal`: N(0, 1) in fp64 for a range of each grown tensor, drawn for this growth.
    """

    name: str
    kind: str
    key: str
    activation: str
    width: int
    old_tokens: int
    new_tokens: int
    scale: float
    seed: int
    old_keys: Mapping[str, Elements]
    initial_keys: Mapping[str, Elements]
    initial_values: Mapping[str, Elements]
    old_values: Mapping[str, Elements] = field(default_factory=dict)
    normal: Mapping[str, Elements] = field(default_factory=dict)

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
    """The result of a method. ConfigError when the new tokens would be dead.

    `scale`: τ afterwards.  `keys`, `values`: the new rows of each key and value tensor, by range of the grown tensor;
    None is zeros in all of them.
    `old_values_factor`: factor of the old value tokens.
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


def zero_key(projection: GrowingProjection) -> NewTokens:
    """New keys 0, new values random, τ held: keeps the function exactly, to the last bit in exact arithmetic.

    A new key k = 0 has the score x·k = 0 at every position. An activation that ignores zero scores leaves the statistic
    of the row as it is and, with τ held, every old term S_i v_i too; a new term is 0 · v = 0. Old values are *not*
    rescaled: the factor √(n_old/n_new) on them that is known from the official code makes up for τ moving from √n_old
    to √n_new (see `gram`), which it does not do here.

    In the first step the new values get no gradient (their weight is 0) but the new keys do, since the values are
    not 0. With both 0 the token would be dead for ever.
    """
    if not _ignores_zero(ACTIVATIONS[projection.activation]):
        raise _refusal("zero_key", projection, _ignores_zero, "it has a weight, or changes those of the others")
    return NewTokens(projection.scale, keys=None, values=projection.initial_values)


def gram(projection: GrowingProjection) -> NewTokens:
    """τ' as the official code computes it from n_new, so that this code loads the grown model and keeps its function.

    By keys, where S is a function φ of τA/‖A‖: out = Σ_i φ(τ A_i / ‖A‖) v_i. The new tokens have value 0, so only ‖A‖
        feels them: ‖A'‖² = xᵀ(KᵀK + RᵀR)x = τ'²/τ² ‖A‖²  when  RᵀR = (τ'²/τ² − 1) KᵀK,  and so τ'/‖A'‖ = τ/‖A‖.
        For τ = √n_old the factor is n_new/n_old − 1; for a τ held by an earlier `zero_key` it is larger. R is a random
        orthonormal mixing of the square root of the Gram matrix, see `GramKeys`: new directions, not copies. That
        takes as many new tokens as KᵀK has rank: min(n_old, width). The new values learn at once.
    By values, where S is proportional to τ and zero scores are ignored: the same end is reached with new keys 0 and old
        values times τ/τ', which makes up for τ; new values random.
    """
    scale, old, new = projection.default_scale, projection.old_tokens, projection.new_tokens
    activation = ACTIVATIONS[projection.activation]
    if not _makes_up_for_scale(activation):
        raise _refusal("gram", projection, _makes_up_for_scale, "neither keys nor values make up for another τ")
    _check_one_pair("gram", projection, "zero_key")
    if not activation.scales_normed_scores:
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
            f"{projection.key}: gram sets τ of {projection.kind} to √{new} = {scale:.6g}, which must be more than the "
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
            old_keys,
            old_tokens=old,
            added_tokens=new - old,
            width=projection.width,
            factor=factor,
            seed=projection.seed,
            name=projection.name,
        )

    return NewTokens(scale, {name: read}, values=None)


def random(projection: GrowingProjection) -> NewTokens:
    """New keys and values random, τ' the default, as the official code grows: the function changes. For comparison."""
    return NewTokens(projection.default_scale, projection.initial_keys, projection.initial_values)


def matched(projection: GrowingProjection) -> NewTokens:
    """New tokens as large as the old ones, so that outputs keep their variance. The function changes.

    Let w = E[S_i²] be the mean square weight of a token. Values that are drawn independently of all else, with variance
    σ², give each element of the output the variance n_old w σ².

    Keys: the new ones are normal with the root mean square of the old ones. Over inputs of equal variance in every
        direction a new score is then as large as an old one, in the mean square, so the norm of the scores (after GELU
        or before it) grows by √(n_new/n_old), and a sum of exponentials by n_new/n_old.
    τ' grows by the same factor. So an old token keeps its weight, up to the chance of the draw, and a new one has the
        same w. Under a held τ weights would shrink, and with them GELU would come into its straight part.
    Values: all are multiplied by √(n_old/n_new), with new ones that are normal with the root mean square of the old
        ones. The variance is n_new w (n_old/n_new) σ² = n_old w σ², what it was.

    What is kept is this variance, and τ over its default. The function is not: √(n_old/n_new) of the old output is
    left, and the rest of the variance comes from new tokens. Values of a trained projection are not independent of
    their weights: if its outputs have f times the variance n_old w σ², the grown ones have 1 + (f − 1) n_old/n_new
    times that.
    """
    _check_one_pair("matched", projection, "random")
    default = ACTIVATIONS[projection.activation].default_scale
    old, new = projection.old_tokens, projection.new_tokens
    factor = (old / new) ** 0.5
    ((key, keys),) = projection.old_keys.items()
    ((value, values),) = projection.old_values.items()
    return NewTokens(
        projection.scale * default(new) / default(old),
        {key: _as_large_as(keys, projection, key)},
        {value: _as_large_as(values, projection, value, factor)},
        old_values_factor=factor,
    )


def _as_large_as(old: Elements, projection: GrowingProjection, tensor: str, factor: float = 1.0) -> Elements:
    """Normal, with `factor` times the root mean square of the old elements of `tensor`."""

    @cache
    def size() -> float:
        from megatron_tf.growth.sizes import root_mean_square  # needs torch

        count = projection.old_tokens * projection.width
        return factor * root_mean_square(old, count, f"{projection.name}.{tensor}")

    return lambda start, stop: projection.normal[tensor](start, stop) * size()


SPLIT = "split"  # makes candidates of tokens instead of new ones, see `growth.split`
METHODS: dict[str, Callable[[GrowingProjection], NewTokens]] = {
    "zero_key": zero_key,
    "gram": gram,
    "random": random,
    "matched": matched,
}
BANK = "bank"  # puts slots of candidates next to the tokens, see `growth.bank`
# without matched, because it reduces old values, and those of an adapter may be frozen
METHODS_OF_ADAPTERS = (*(name for name in METHODS if name != "matched"), SPLIT)
PRESERVING = frozenset({"zero_key", "gram"})  # methods that promise to keep the function; without noise they do


def method_named(name: str) -> Callable[[GrowingProjection], NewTokens]:
    """The method that makes the new tokens. For the slots of a bank it is zero_key."""
    return METHODS["zero_key" if name == BANK else name]


def _ignores_zero(activation: Activation) -> bool:
    return activation.ignores_zero


def _makes_up_for_scale(activation: Activation) -> bool:
    return activation.scales_normed_scores or (activation.proportional_to_scale and activation.ignores_zero)


def _check_one_pair(method: str, projection: GrowingProjection, instead: str) -> None:
    """ConfigError unless the projection has one key and one value tensor."""
    tensors = (*projection.initial_keys, *projection.initial_values)
    if len(tensors) != 2:
        kind = projection.kind
        has_bank = any(name.startswith("bank.") for name in tensors)
        others = f"model.sparse.{kind} has candidates" if has_bank else f"those of {kind} are {', '.join(tensors)}"
        raise ConfigError(
            f"{projection.key}: {method} grows projections of one key and one value tensor, and {others}. Set the "
            f"method to {instead}."
        )


def _refusal(
    method: str, projection: GrowingProjection, is_able: Callable[[Activation], bool], reason: str
) -> ConfigError:
    """`reason`: as a clause, for activations that do not give their own."""
    able = [name for name in ACTIVATIONS.names() if is_able(ACTIVATIONS[name])]
    return ConfigError(
        f"{projection.key}: {method} cannot keep the function of a {projection.activation} model: "
        f"{ACTIVATIONS[projection.activation].refusals.get(method, reason)}. Set the method to random, which changes "
        f"the function, or grow a model of model.activation {either(able)}."
    )
