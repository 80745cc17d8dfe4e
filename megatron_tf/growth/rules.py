"""Whether one model can grow into another, and by which methods: arithmetic on configurations, without torch or
state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_tf.config.differences import differing
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import ConfigError
from megatron_tf.growth.axes import GO_ON, axes, steps
from megatron_tf.state.parameters import initial_scales

DEFAULTS = Growth(source="anywhere")
_WIDTHS = (
    ". The Pile models 150M, 450M, 900M and 1.5B differ in it, and none grows into another; nor do the paper's models "
    "of 768 (124M to 1.4B) into the official repository's of 1024 (354M, 757M)"
)


def chain_problems(stages: Sequence[RunConfig]) -> list[str]:
    """A problem for each stage that cannot be grown from the stage before it, found before days of training."""
    problems: list[str] = []
    scales: Mapping[str, float] = initial_scales(stages[0].model)
    for before, after in zip(stages, stages[1:]):
        if after.growth is None:
            break
        found = growth_problems(before.model, after.model, after.growth)
        if after.growth.at == "before_decay" and not before.checkpoint.keep_before_decay:
            found.append(
                f"growth.at: before_decay, but checkpoint.keep_before_decay of {before.run.name} is false. Set it to "
                "true, or growth.at to end."
            )
        try:
            if not found:
                scales = scales_after_growth(before.model, after.model, after.growth, scales)
        except ConfigError as error:
            found = error.problems
        problems += [f"stage {after.run.name}: {problem}" for problem in found]
        if found:
            break  # τ is not known from here on
    return problems


def growth_problems(old: Model, new: Model, growth: Growth = DEFAULTS) -> list[str]:
    """Why `old` cannot grow into `new`, with every offending key and both values. Empty when they differ only along the
    axes of growth, and `new` is larger along at least one and smaller along none."""
    if old.architecture != new.architecture:
        return [
            f"model.architecture: {old.architecture} before, {new.architecture} after. Growth keeps the architecture: "
            "train the new one from scratch, without growth."
        ]
    if old.task != new.task:
        return [
            f"model.task: {old.task} before, {new.task} after. Growth keeps the task: give a smaller model of the same "
            "task, or train the new one from scratch, without growth."
        ]
    own = [axis for axis in axes() if axis.serves(old)]
    *several, last = (axis.changes for axis in own)
    changes = f"{', '.join(several)} and {last}"
    problems = [
        f"model.{key}: {before} before, {after} after. Growth changes {changes} only: set it to {before}, or train the "
        f"new model from scratch, without growth{_WIDTHS if key == 'hidden_size' else ''}"
        for key, before, after in differing(old, new)
        if not any(axis.claims(key) for axis in own)
    ]
    for axis in own:
        problems += axis.problems(old, new, growth)
    if not problems:
        problems += _needless(old, new, growth)
    return [problem + "." for problem in problems]


def scales_after_growth(
    old_model: Model, new_model: Model, growth: Growth, scales: Mapping[str, float]
) -> Mapping[str, float]:
    """τ of every projection once `old_model`, whose τ are `scales`, has grown.

    ConfigError, with all problems, when `growth` cannot do it: so each stage of a chain is checked before the first.
    """
    for axis, before, after in steps(old_model, new_model):
        scales = axis.scales(before, after, growth, scales)
    return scales


def _needless(old: Model, new: Model, growth: Growth) -> list[str]:
    """Problems with settings that would have no effect."""
    grown = [axis for axis, _, _ in steps(old, new)]
    if not grown:
        sizes: dict[str, object] = {"model.num_layers": new.num_layers}
        if tokens := new.model_dump().get("parameter_tokens"):
            counts = ", ".join(f"{kind}: {count}" for kind, count in tokens.items())
            sizes = {"model.parameter_tokens": f"{{{counts}}}", **sizes}
        given = " and ".join(f"{key} {value}" for key, value in sizes.items())
        return [f"growth: the smaller model has {given} already. Raise {' or '.join(sizes)}, or {GO_ON}"]
    if growth.moments_factor != 1 and growth.moments == "reset":
        return [
            f"growth.moments_factor: {growth.moments_factor:g} is of moments that are kept, and growth.moments is "
            "reset. Set it to 1, or growth.moments to keep"
        ]
    if growth.noise and not any(axis.takes_noise for axis in grown):
        return [
            f"growth.noise: {growth.noise:g} changes the old tokens of projections that grow, and 0 of them do. Set it "
            "to 0, or raise model.parameter_tokens"
        ]
    return [problem for axis in axes() for problem in axis.without_effect(old, new, growth)]
