"""Whether one model can grow into another, and by which methods: arithmetic on configurations, without torch or state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.differences import TOKENS, differing
from megatron_tf.config.schema import Growth, GrowthMethod, Model, RunConfig
from megatron_tf.errors import ConfigError
from megatron_tf.growth.methods import METHODS, SPLIT, Elements, NewTokens, Projection
from megatron_tf.state.parameters import initial_scales, parameter_table, projections

DEFAULT_METHOD: GrowthMethod = Growth.model_fields["method"].default
SPARSE = "sparse."


def chain_problems(stages: Sequence[RunConfig]) -> list[str]:
    """Stages that cannot be grown from the stage before them: known now, and not when days of training are over."""
    problems: list[str] = []
    scales: Mapping[str, float] = initial_scales(stages[0].model)
    for before, after in zip(stages, stages[1:]):
        if after.growth is None:
            break
        found = growth_problems(before.model, after.model, after.growth.method)
        try:
            if not found:
                scales = scales_after_growth(before.model, after.model, after.growth, scales)
        except ConfigError as error:
            found = error.problems
        problems += [f"stage {after.run.name}: {problem}" for problem in found]
        if found:
            break  # what τ would be is not known from here on
    return problems


def growth_problems(old: Model, new: Model, method: GrowthMethod = DEFAULT_METHOD) -> list[str]:
    """Why `old` cannot grow into `new` by `method`: every differing key with both values, unless they differ in token
    counts alone, and `new` has more in at least one kind of projection and fewer in none. For split, see there."""
    without = [model.architecture for model in (old, new) if not architecture_of(model).token_counts(model)]
    if without:
        return [
            f"model.architecture: {old.architecture} before, {new.architecture} after. Growth appends parameter tokens, "
            f"and a {without[0]} has none: train it from scratch, without growth."
        ]
    if old.architecture != new.architecture:
        return [
            f"model.architecture: {old.architecture} before, {new.architecture} after. Growth keeps the architecture: train "
            "the new one from scratch, without growth."
        ]
    if method == SPLIT:
        return split_problems(old, new)
    problems, grows, foreign = [], False, False
    for key, before, after in differing(old, new):
        if key.startswith(SPARSE):
            problems.append(
                f"model.{key}: {before} before, {after} after. Growth by {method} appends tokens to the slots and dense "
                "tokens that there are; to copy those of a dense model to candidates, set growth.method to split"
            )
        elif not key.startswith(TOKENS):
            foreign = True
            problems.append(f"model.{key}: {before} before, {after} after. Growth changes token counts only")
        elif after < before:
            problems.append(f"model.{key}: {before} before, {after} after. Growth cannot take tokens away")
        else:
            grows = True
    if foreign:
        problems[-1] += (
            ". Models that differ in width, depth, heads or vocabulary never grow into each other; so it is with the "
            "Pile models 150M, 450M, 900M and 1.5B, and with the paper's 12 × 768 models (124M to 1.4B) and the "
            "official repository's 24 × 1024 ones (354M, 757M)"
        )
    if not problems and not grows:
        problems.append("growth: the smaller model has these token counts already. Raise model.parameter_tokens")
    return [problem + "." for problem in problems]


def split_problems(old: Model, new: Model) -> list[str]:
    """Why `old` cannot be split into `new`: every differing key with both values, unless `old` is dense and `new` the same
    with candidates."""
    problems = []
    if not any(projection.bank for projection in projections(new).values()):
        problems.append(
            "growth.method: split copies tokens to candidates, and the model has none. Set model.sparse.ffn to "
            "{group_size: 256, candidates: 4}, or growth.method to zero_key."
        )
    for key, before, after in differing(old, new):
        if not key.startswith(SPARSE):
            problems.append(
                f"model.{key}: {before} before, {after} after. split changes model.sparse only: grow by another method in "
                "a run before or after it."
            )
        elif before != "null":
            problems.append(
                f"model.{key}: {before} before, {after} after. Candidates cannot be split again, because positions choose "
                "among them already: split the dense model that they come from, or restore the key."
            )
    if not problems and any(projection.bank for projection in projections(old).values()):
        problems.append("growth: the smaller model has these candidates already. Go on with it, without growth.")
    return problems


def scales_after_growth(
    old_model: Model, new_model: Model, growth: Growth, scales: Mapping[str, float]
) -> Mapping[str, float]:
    """τ of every projection once `old_model`, whose τ are `scales`, has grown.

    ConfigError, with all problems, when `growth` cannot do it: so each stage of a chain is checked before the first.
    """
    if growth.method == SPLIT:
        if problems := growth_problems(old_model, new_model, SPLIT):
            raise ConfigError(problems)
        return scales
    decided = decide(growing(old_model, new_model, growth, scales, 0, _no_state, _no_state), growth)
    return {**scales, **{name: tokens.scale for name, tokens in decided.items()}}


def growing(
    old_model: Model,
    new_model: Model,
    growth: Growth,
    scales: Mapping[str, float],
    seed: int,
    old_weights: Callable[[str], Elements],
    initial_weights: Callable[[str], Elements],
) -> dict[str, Projection]:
    """The projections that grow, by name.

    `scales`: τ before.  `seed`: of this growth.  `old_weights`, `initial_weights`: of a tensor of the smaller model, and
    what the initialiser puts into one of the bigger model. ConfigError unless the one can grow into the other.
    """
    if problems := growth_problems(old_model, new_model):
        raise ConfigError(problems)
    before = projections(old_model)
    shapes = parameter_table(new_model)
    found = {}
    for name, spec in projections(new_model).items():
        if before[name].tokens == spec.tokens:
            continue
        chosen = getattr(growth.methods, spec.kind, None)
        found[name] = Projection(
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
            initial_keys={key: initial_weights(f"{name}.{key}") for key in spec.keys},
            initial_values={value: initial_weights(f"{name}.{value}") for value in spec.values},
        )
    return found


def decide(growing: Mapping[str, Projection], growth: Growth) -> dict[str, NewTokens]:
    """What the method of each projection makes of it; ConfigError with all problems."""
    decided, problems = {}, []
    for name, projection in growing.items():
        try:
            decided[name] = METHODS[growth.method_of(projection.kind)](projection)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))  # layers repeat each other
    return decided


def _no_state(tensor: str) -> Elements:
    def read(start: int, stop: int) -> Any:
        raise AssertionError("a method has read state before it was asked for elements")

    return read
