"""A chain that delivers every size: `deliver: {decay: 0.2}`, for all stages or for one.

The last fifth of a stage is then a decay of its learning rate (a `wsd` schedule), at the end of which its model is
finished. The state before that decay is kept, and the next stage grows from there. So it is a branch that decays, while
the trunk goes on by growing.
"""

from __future__ import annotations

from typing import Any

from megatron_tf.config.rules.batch import length_problems
from megatron_tf.config.run_plan import steps_to_train
from megatron_tf.config.schema import RunConfig
from megatron_tf.errors import ConfigError

KEY = "deliver"
Values = dict[str, Any]


def take_share(values: Values, problems: list[str]) -> float | None:
    """The share of its steps that a stage's decay takes, out of its plain values. None: it is not delivered so."""
    given = values.pop(KEY, None)
    if given is None:
        return None
    share = given.get("decay") if isinstance(given, dict) and set(given) == {"decay"} else None
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        problems.append(
            f"{KEY}: {given!r} does not say how long the decay at the end of a stage is. Write it as "
            f"{KEY}: {{decay: 0.2}}, a share of the stage's steps above 0 and below 1."
        )
        return None
    return float(share)


def refuse_alone(values: Values, problems: list[str]) -> None:
    """Of a file without stages."""
    if values.pop(KEY, None) is not None:
        problems.append(
            f"{KEY}: is for a chain, and this file has no stages. Give optimizer.schedule the type wsd and "
            "decay_steps, and set checkpoint.keep_before_decay to true."
        )


def keep_both(values: Values, problems: list[str]) -> None:
    """Lets a stage end with a decay, of one step until its length is known, and keep the state before it."""
    schedule = _section(_section(values, "optimizer"), "schedule")
    checkpoint = _section(values, "checkpoint")
    if (decay := schedule.get("decay_steps")) is not None:
        problems.append(
            f"optimizer.schedule.decay_steps: {decay}, but {KEY} says how long the decay is, as a share of the stage. "
            "Remove one of the two."
        )
    if checkpoint.get("keep_before_decay") is False:
        problems.append(
            f"checkpoint.keep_before_decay: false, but with {KEY} the next stage grows from there. Remove it, or {KEY}."
        )
    schedule |= {"type": "wsd", "decay_steps": 1}
    checkpoint["keep_before_decay"] = True


def grow_from_before(growth: Values, problems: list[str]) -> None:
    """Of the stage after one that is delivered; `growth`: its section."""
    if (at := growth.setdefault("at", "before_decay")) == "end":
        problems.append(
            f"growth.at: {at}, but with {KEY} a stage grows from before the decay of the stage before it. Remove it, "
            f"or {KEY} of that stage."
        )


def with_decay(stage: RunConfig, share: float) -> RunConfig:
    """The stage with as many decaying steps as `share` of its own are. ConfigError when warm-up and decay are longer
    than the stage."""
    if list(length_problems(stage)):
        # how long it is cannot be said, which `validate` tells
        return stage
    steps, warmup = steps_to_train(stage), stage.optimizer.schedule.warmup_steps
    decay = max(1, round(share * steps))
    if warmup + decay > steps >= warmup:
        raise ConfigError(
            f"{KEY}: a decay of {share:g} of {steps} steps is {decay} steps, and optimizer.schedule.warmup_steps is "
            f"{warmup}: together more than the stage has. Lower one of the two."
        )
    schedule = stage.optimizer.schedule.model_copy(update={"decay_steps": decay})
    return stage.model_copy(update={"optimizer": stage.optimizer.model_copy(update={"schedule": schedule})})


def _section(values: Values, name: str) -> Values:
    """The section in `values`, made where there is none. What is no section stays, and is refused with its sentence."""
    if values.get(name) is None:
        values[name] = {}
    found = values[name]
    return found if isinstance(found, dict) else {}
