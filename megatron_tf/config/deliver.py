"""A chain that delivers every size: `deliver: {decay: 0.2}`, for all stages or for one.

The learning rate then decays over the last fifth of a stage (a `wsd` schedule), at whose end the stage's model is
finished. The state before that decay is kept, and the next stage grows from there: the decays are branches, and the
trunk grows on.
"""

from __future__ import annotations

from typing import Any

from megatron_tf.config.rules.batch import length_problems
from megatron_tf.config.run_plan import steps_to_train
from megatron_tf.config.schema import RunConfig
from megatron_tf.errors import ConfigError
from megatron_tf.telemetry.text import count_of

KEY = "deliver"
Values = dict[str, Any]


def take_share(values: Values, problems: list[str]) -> float | None:
    """Removes `deliver` from a stage's plain values. Returns the share of its steps that decay.

    None when `deliver` is not given, or is wrong, which is added to `problems`.
    """
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
    """Removes `deliver` from the plain values of a file without stages, and adds it to `problems`."""
    if values.pop(KEY, None) is not None:
        problems.append(
            f"{KEY}: is for a chain, and this file has no stages. Give optimizer.schedule the type wsd and "
            "decay_steps, and set checkpoint.keep_before_decay to true."
        )


def keep_both(values: Values, problems: list[str]) -> None:
    """Makes a stage end with a decay and keep the state before it, in its plain values.

    The decay is one step long until `with_decay`, which needs the stage's length, sets it.
    """
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
    """Makes the stage after a delivered one grow from before the decay. `growth`: its section, changed in place."""
    if (at := growth.setdefault("at", "before_decay")) == "end":
        problems.append(
            f"growth.at: {at}, but with {KEY} a stage grows from before the decay of the stage before it. Remove it, "
            f"or {KEY} of that stage."
        )


def with_decay(stage: RunConfig, share: float) -> RunConfig:
    """The stage with a decay over `share` of its steps. ConfigError when warm-up and decay do not fit into it."""
    if list(length_problems(stage)):
        # its length is given not at all or twice, which `validate` reports
        return stage
    steps, warmup = steps_to_train(stage), stage.optimizer.schedule.warmup_steps
    decay = max(1, round(share * steps))
    if warmup + decay > steps >= warmup:
        raise ConfigError(
            f"{KEY}: a decay of {share:g} of {count_of(steps, 'step')} is {count_of(decay, 'step')}, and "
            f"optimizer.schedule.warmup_steps is {warmup}: together more than the stage has. Lower one of the two."
        )
    schedule = stage.optimizer.schedule.model_copy(update={"decay_steps": decay})
    return stage.model_copy(update={"optimizer": stage.optimizer.model_copy(update={"schedule": schedule})})


def _section(values: Values, name: str) -> Values:
    """The section in `values`, created if missing. A value that is not a mapping stays: `build_config` reports it."""
    if values.get(name) is None:
        values[name] = {}
    found = values[name]
    return found if isinstance(found, dict) else {}
