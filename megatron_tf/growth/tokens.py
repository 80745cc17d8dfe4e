"""Growth in parameter tokens: the projections that grow, and their methods. `growth.source` has the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.differences import TOKENS as TOKENS_KEY
from megatron_tf.config.differences import differing
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import ConfigError
from megatron_tf.growth.axes import PRUNE, Axis
from megatron_tf.growth.methods import BANK, PRESERVING, Elements, GrowingProjection, NewTokens, method_named
from megatron_tf.state.parameters import ParameterSpec, parameter_table, projections

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_tf.state.sources import StateSource


class TokensAxis(Axis):
    order = 1
    keys = (TOKENS_KEY,)
    changes = "token counts"
    takes_noise = True

    def between(self, old: Model, new: Model) -> Model:
        return architecture_of(old).with_token_counts(old, architecture_of(new).token_counts(new))

    def problems(self, old: Model, new: Model, growth: Growth) -> list[str]:
        banks = {projection.kind for projection in projections(old).values() if projection.bank}
        found = []
        for key, before, after in differing(old, new):
            kind = key.removeprefix(TOKENS_KEY)
            if self.claims(key) and after < before:
                # tokens of slots are pruned by candidates alone, which leaves their counts as they are
                pruned = "" if kind in banks else f", or prune the smaller model first: {PRUNE} --tokens {kind}={after}"
                found.append(
                    f"model.{key}: {before} before, {after} after. Growth cannot take tokens away: set it to {before}"
                    + pruned
                )
        return found

    def without_effect(self, old: Model, new: Model, growth: Growth) -> list[str]:
        counts = architecture_of(new).token_counts(new)
        grown = methods(old, new, growth)
        found = []
        for kind, chosen in growth.methods:
            if chosen is None or kind in grown:
                continue
            key = f"growth.methods.{kind}"
            if kind in counts:
                found.append(
                    f"{key}: {chosen} makes new tokens, and model.parameter_tokens.{kind} is {counts[kind]} before and "
                    f"after. Raise model.parameter_tokens.{kind}, or remove {key}"
                )
            else:
                found.append(
                    f"{key}: {chosen}, but a {new.architecture} has no {kind} tokens that could grow. Remove it"
                )
        return found

    def scales(self, old: Model, new: Model, growth: Growth, scales: Mapping[str, float]) -> Mapping[str, float]:
        decided = decide(growing(old, new, growth, scales, 0, _no_state, _no_state), growth)
        return {**scales, **{name: tokens.scale for name, tokens in decided.items()}}

    def preserves(self, old: Model, new: Model, growth: Growth) -> bool:
        return set(methods(old, new, growth).values()) <= {*PRESERVING, BANK} and not growth.noise

    def record(self, old: Model, new: Model, growth: Growth) -> dict[str, Any]:
        by_kind = methods(old, new, growth)
        distinct = set(by_kind.values())
        return {"method": distinct.pop() if len(distinct) == 1 else by_kind}

    def source(
        self, old: StateSource, fresh: StateSource, *, old_model: Model, new_model: Model, growth: Growth, seed: int
    ) -> StateSource:
        from megatron_tf.growth.source import AppendedSource

        return AppendedSource(old, fresh, old_model=old_model, new_model=new_model, growth=growth, seed=seed)


TOKENS = TokensAxis()


def methods(old: Model, new: Model, growth: Growth) -> dict[str, str]:
    """The method of each kind of projection that grows."""
    before, after = (architecture_of(model).token_counts(model) for model in (old, new))
    return {kind: growth.method_of(kind) for kind, count in after.items() if count != before[kind]}


def growing(
    old_model: Model,
    new_model: Model,
    growth: Growth,
    scales: Mapping[str, float],
    seed: int,
    old_weights: Callable[[str], Elements],
    initial_weights: Callable[[str], Elements],
) -> dict[str, GrowingProjection]:
    """The projections that grow, by name.

    `scales`: τ before.  `seed`: of this growth.  `old_weights`: reads a named tensor of the smaller model.
    `initial_weights`: reads the initial values of one of the bigger model.
    """
    before = projections(old_model)
    shapes = parameter_table(new_model)
    found = {}
    for name, spec in projections(new_model).items():
        if before[name].tokens == spec.tokens:
            continue
        chosen = getattr(growth.methods, spec.kind, None)
        found[name] = GrowingProjection(
            name=name,
            kind=spec.kind,
            key=f"growth.methods.{spec.kind}" if chosen else "growth.method",
            activation=spec.activation,
            width=shapes[f"{name}.{spec.keys[0]}"].width,
            old_tokens=before[name].tokens,
            new_tokens=spec.tokens,
            scale=scales[name],
            seed=seed,
            old_keys={key: old_weights(f"{name}.{key}") for key in spec.keys},
            old_values={value: old_weights(f"{name}.{value}") for value in spec.values},
            initial_keys={key: initial_weights(f"{name}.{key}") for key in spec.keys},
            initial_values={value: initial_weights(f"{name}.{value}") for value in spec.values},
            normal={part: _normal(shapes[f"{name}.{part}"], seed) for part in (*spec.keys, *spec.values)},
        )
    return found


def decide(growing: Mapping[str, GrowingProjection], growth: Growth) -> dict[str, NewTokens]:
    """The new tokens of each projection, from its method. ConfigError with all problems."""
    decided, problems = {}, []
    for name, projection in growing.items():
        try:
            decided[name] = method_named(growth.method_of(projection.kind))(projection)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))  # layers have the same problems
    return decided


def _normal(spec: ParameterSpec, seed: int) -> Elements:
    def read(start: int, stop: int) -> Tensor:
        from megatron_tf.growth.noise import noise  # needs torch

        return noise(spec, seed, start, stop)

    return read


def _no_state(tensor: str) -> Elements:
    def read(start: int, stop: int) -> Any:
        raise AssertionError("a method has read state before it was asked for elements")

    return read
