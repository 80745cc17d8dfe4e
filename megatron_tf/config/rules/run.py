"""Rules of keys that need something else: of another task, of parameter tokens, or of validation data."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.fields import Section
from megatron_tf.config.rules.batch import length_problems
from megatron_tf.config.run_plan import steps_to_train
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.tasks import TASKS, task_of


def _given(key: str, value: object) -> Iterator[str]:
    """Yields "key: value"; for a section, one for each of its keys that has another value than its default."""
    if not isinstance(value, Section):
        yield f"{key}: {value}"
        return
    for name, field in type(value).model_fields.items():
        own = getattr(value, name)
        if own != field.get_default(call_default_factory=True):
            yield from _given(f"{key}.{name}", own)


def task_problems(config: RunConfig) -> Iterator[str]:
    own, task = task_of(config.model), config.model.task
    for owner in TASKS.names():
        for key in TASKS[owner].own_keys:
            section, _, name = key.partition(".")
            value = getattr(getattr(config, section), name)
            default = type(getattr(config, section)).model_fields[name].get_default()
            if key not in own.own_keys and value != default:
                given = ", ".join(_given(key, value))
                yield f"{given} means nothing to the task {task}. Remove it, or set model.task to {owner}."
    yield from own.run_problems(config)


def run_problems(config: RunConfig) -> Iterator[str]:
    profile = config.training.profile
    if profile is not None and not list(length_problems(config)):
        last, steps = profile.first_step + profile.num_steps - 1, steps_to_train(config)
        if last > steps:
            yield (
                f"training.profile: steps {profile.first_step} to {last} are to be recorded, but the run has {steps}. "
                "Lower first_step or num_steps."
            )
    health = config.logging.health_interval_steps
    has_tokens = bool(architecture_of(config.model).token_counts(config.model))
    if health is not None and not has_tokens:
        yield (
            f"logging.health_interval_steps: {health}, but a {config.model.architecture} has no parameter tokens to "
            "measure. Remove logging.health_interval_steps."
        )
    for key, usual in {"norm": "auto", "scores": "keep"}.items():
        value = getattr(config.training, key)
        if value != usual and not has_tokens:
            yield (
                f"training.{key}: {value}, but a {config.model.architecture} has no parameter tokens, and so no scores "
                f"of them. Set it to {usual}."
            )
    if config.training.precision == "fp8" and not has_tokens:
        yield (
            f"training.precision: fp8 is for products with parameter tokens, which a {config.model.architecture} does "
            "not have. Set it to bf16."
        )
    yield from _evaluation_problems(config)


def _evaluation_problems(config: RunConfig) -> Iterator[str]:
    interval, stop_when = config.evaluation.interval_steps, config.training.stop_when
    if interval is not None and not config.data.validation:
        yield (
            f"evaluation.interval_steps: {interval}, but data.validation is empty. "
            "Give data.validation, or remove evaluation.interval_steps."
        )
    if stop_when is not None and interval is None:
        yield "training.stop_when: without evaluation.interval_steps there is no validation loss to stop by. Set both."
    if stop_when is not None and stop_when.loss_below is None and stop_when.patience is None:
        yield "training.stop_when: says no condition. Give loss_below or patience, or remove it."
