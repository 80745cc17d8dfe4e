"""Rules between fields, and the arithmetic of a run at a given world size. No torch, no process group.

`validate` reports every problem at once, before anything is started; `topology_for` and `plan_batches`
compute what the run then uses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.engine_rules import (
    engine_problems,
    loss_scale_problems,
    lr_rule_problems,
    matrix_problems,
    pipeline_problems,
    zero_problems,
)
from megatron_tf.config.nearest import divisors, divisors_near, either, listed, multiples_near
from megatron_tf.config.schema import Model, RunConfig
from megatron_tf.config.tasks import TASKS, task_of
from megatron_tf.config.topology import Topology
from megatron_tf.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of a step are spread, and how many steps the run has.

    global_batch_size = micro_batch_size × num_micro_batches × data_parallel.
    """

    micro_batch_size: int  # samples a rank computes at once
    num_micro_batches: int  # micro batches a rank accumulates into one step
    data_parallel: int
    seq_length: int  # tokens a sample
    train_steps: int  # number of the run's last step
    # The schedule in its own unit, which is a step as the run began; see `plan_batches`
    schedule_steps: float = 0.0  # its length
    schedule_from: tuple[int, float] = (0, 0.0)  # this step number is this position
    schedule_pace: float = 1.0  # positions a step

    @property
    def global_batch_size(self) -> int:
        """Samples a step, over all ranks."""
        return self.micro_batch_size * self.num_micro_batches * self.data_parallel

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length

    def schedule_position(self, step: int) -> float:
        """Where the learning rate's schedule stands at the 0-based `step`."""
        first, position = self.schedule_from
        return position + (step - first) * self.schedule_pace

    @property
    def train_tokens(self) -> int:
        """Tokens of a whole run that never changes its batch."""
        return self.train_steps * self.tokens_per_step


def topology_for(config: RunConfig, world_size: int) -> Topology:
    """The rank grid; ranks left over by tensor × pipeline × context become data-parallel. ConfigError when uneven."""
    _raise_if_any(_layout_problems(config, world_size))
    parallel = config.parallel
    data = world_size // parallel.ranks_per_sample
    return Topology(parallel.tensor, parallel.pipeline, data, parallel.context, parallel.virtual_stages)


def plan_batches(
    config: RunConfig, world_size: int, step: int = 0, tokens: int = 0, schedule_unit: int | None = None
) -> BatchPlan:
    """Batch arithmetic of a run that has done `step` steps on `tokens` tokens so far.

    `training.train_tokens`, or `train_samples`, is met by whole steps, rounded up, the ones that are left being of the
    present size.
    `schedule_unit`: tokens of a step when the run began. The schedule, with its warm-up and decay, is counted in such
    steps throughout, so the learning rate goes on where it was when the batch is another than before.
    With `training.train_steps` a step is a step. ConfigError when the arithmetic has no solution.
    """
    data_parallel = topology_for(config, world_size).data
    _raise_if_any([*_batch_problems(config, data_parallel), *_length_problems(config)])
    training = config.training
    train_steps = _train_steps(config)
    schedule: dict[str, Any] = {"schedule_steps": float(train_steps)}
    if (tokens_in_all := tokens_to_train(config)) is not None:
        tokens_per_step = training.global_batch_size * config.model.seq_length
        train_steps = step + math.ceil(max(0, tokens_in_all - tokens) / tokens_per_step)
        unit = schedule_unit or tokens_per_step
        schedule = {
            "schedule_steps": float(math.ceil(tokens_in_all / unit)),
            "schedule_from": (step, tokens / unit),
            "schedule_pace": tokens_per_step / unit,
        }
    return BatchPlan(
        micro_batch_size=training.micro_batch_size,
        num_micro_batches=training.global_batch_size // (training.micro_batch_size * data_parallel),
        data_parallel=data_parallel,
        seq_length=config.model.seq_length,
        train_steps=train_steps,
        **schedule,
    )


def validate(config: RunConfig, world_size: int) -> None:
    """Raise one ConfigError with everything that cannot run on `world_size` ranks; each with its remedy."""
    problems = list(_layout_problems(config, world_size))
    if not problems:
        data_parallel = topology_for(config, world_size).data
        for needs_layout in (_batch_problems, pipeline_problems, matrix_problems):
            problems += needs_layout(config, data_parallel)
    problems += [*_length_problems(config), *_model_problems(config.model)]
    for rule in (
        _stage_problems,
        _sharding_problems,
        _schedule_problems,
        engine_problems,
        zero_problems,
        loss_scale_problems,
        lr_rule_problems,
        _task_problems,
        _run_problems,
    ):
        problems += rule(config)
    _raise_if_any(problems)


def validate_layout(config: RunConfig, world_size: int) -> None:
    """Raise one ConfigError unless the model can be spread over `world_size` ranks, whatever the run's batch is."""
    _raise_if_any(
        [
            *_layout_problems(config, world_size),
            *_model_problems(config.model),
            *_stage_problems(config),
            *_sharding_problems(config),
        ]
    )


def check_model(model: Model) -> None:
    """Raise one ConfigError unless a network can be built of `model`; its fields alone are in their ranges already."""
    _raise_if_any(_model_problems(model))


def _raise_if_any(problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        raise ConfigError(found)


def _layout_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    axes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
    if parallel.context > 1:
        axes["context"] = parallel.context
    ranks = parallel.ranks_per_sample
    if world_size % ranks:
        yield (
            f"parallel: {' × '.join(f'{axis} {size}' for axis, size in axes.items())} needs a multiple of {ranks} "
            f"ranks, but there are {world_size}. Start {either(multiples_near(world_size, ranks))} ranks, or choose "
            f"{' × '.join(axes)} among {listed(divisors(world_size))}."
        )


def _batch_problems(config: RunConfig, data_parallel: int) -> Iterator[str]:
    global_size, micro = config.training.global_batch_size, config.training.micro_batch_size
    samples = micro * data_parallel
    if global_size % samples == 0:
        return
    remedy = f"Set it to {either(multiples_near(global_size, samples))}"
    if global_size % data_parallel == 0:
        micro_sizes = divisors(global_size // data_parallel)
        nearest = sorted(sorted(micro_sizes, key=lambda size: abs(size - micro))[:4])
        remedy += f", or training.micro_batch_size to {either(nearest)}"
    yield (
        f"training.global_batch_size: {global_size} is not a multiple of {samples} "
        f"(training.micro_batch_size {micro} × {data_parallel} data-parallel ranks). {remedy}."
    )


def _length_problems(config: RunConfig) -> Iterator[str]:
    lengths = {name: getattr(config.training, name) for name in ("train_steps", "train_tokens", "train_samples")}
    given = [(name, value) for name, value in lengths.items() if value is not None]
    if not given:
        yield "training: neither train_steps nor train_tokens nor train_samples is given. Give one of them."
    if len(given) > 1:
        (first, one), (second, other) = given[:2]
        yield (
            f"training: both {first} ({one}) and {second} ({other}) are given. Give one; "
            f"an override removes the other with training.{first}=null or training.{second}=null."
        )


def tokens_to_train(config: RunConfig) -> int | None:
    """What training.train_tokens or train_samples gives, in tokens; None where training.train_steps is the length."""
    training = config.training
    if training.train_samples is not None:
        return training.train_samples * config.model.seq_length
    return training.train_tokens


def _train_steps(config: RunConfig) -> int:
    """Steps of the run; requires that its length is given exactly once."""
    training = config.training
    if training.train_steps is not None:
        return training.train_steps
    tokens = tokens_to_train(config)
    assert tokens is not None
    return math.ceil(tokens / (training.global_batch_size * config.model.seq_length))


def _model_problems(model: Model) -> Iterator[str]:
    heads, hidden = model.num_attention_heads, model.hidden_size
    if hidden % heads:
        yield (
            f"model.hidden_size: {hidden} is not a multiple of model.num_attention_heads {heads}. Set it to "
            f"{either(multiples_near(hidden, heads))}, or the heads to {either(divisors_near(hidden, heads))}."
        )
    else:
        yield from _rotary_problems(model)
    yield from architecture_of(model).problems(model)
    yield from task_of(model).problems(model)


def _stage_problems(config: RunConfig) -> Iterator[str]:
    model = config.model
    if config.parallel.pipeline > model.num_layers:
        yield (
            f"parallel.pipeline: {config.parallel.pipeline} stages, but model.num_layers is {model.num_layers} and "
            f"each stage needs a layer. Set it to at most {model.num_layers}."
        )
    elif config.parallel.pipeline * config.parallel.virtual_stages > model.num_layers:
        pipeline, parts = config.parallel.pipeline, config.parallel.virtual_stages
        yield (
            f"parallel.virtual_stages: {parts} parts on each of {pipeline} pipeline ranks need a layer each, but "
            f"model.num_layers is {model.num_layers}. Set it to at most {model.num_layers // pipeline}."
        )


def _rotary_problems(model: Model) -> Iterator[str]:
    head_size = model.hidden_size // model.num_attention_heads
    channels = int(model.rotary_fraction * head_size)
    if channels % 2:
        # rounded up, so that int() of the product is the even number that is meant
        near = [math.ceil(even / head_size * 1e4) / 1e4 for even in (channels - 1, channels + 1) if even <= head_size]
        yield (
            f"model.rotary_fraction: {model.rotary_fraction:g} of {head_size} channels a head rotates {channels} "
            f"channels, but they are rotated in pairs. Set it to {either(f'{fraction:g}' for fraction in near)}."
        )


def _sharding_problems(config: RunConfig) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    if model.num_attention_heads % tensor:
        yield (
            f"parallel.tensor: {tensor} does not divide model.num_attention_heads {model.num_attention_heads}. "
            f"Set it to {either(divisors_near(model.num_attention_heads, tensor))}."
        )
    rows = architecture_of(model).sharded_rows(model)
    for key, count in {**task_of(model).sharded_rows(model), **rows}.items():
        if count < tensor:
            yield (
                f"{key}: {count} rows cannot be split over parallel.tensor {tensor} ranks. "
                f"Set it to at least {tensor}, or parallel.tensor to at most {count}."
            )
    yield from architecture_of(model).layout_problems(config)
    yield from _context_problems(config)
    if not config.parallel.sequence:
        return
    if tensor == 1:
        yield (
            "parallel.sequence: true splits hidden states over the tensor ranks, but parallel.tensor is 1. "
            "Set it to false, or parallel.tensor to 2 or more."
        )
    elif config.parallel.context == 1 and model.seq_length % tensor:
        yield (
            f"model.seq_length: {model.seq_length} is not a multiple of parallel.tensor {tensor}, which "
            f"parallel.sequence needs. {task_of(model).length_remedy(model, tensor)}, or parallel.sequence to false."
        )


def _context_problems(config: RunConfig) -> Iterator[str]:
    """Each context rank has positions of its own between the layers, and heads of its own in attention."""
    model, context, tensor = config.model, config.parallel.context, config.parallel.tensor
    if context == 1:
        return
    if not task_of(model).splits_samples:
        yield (
            f"parallel.context: {context} ranks would share the positions of a sample, which the task {model.task} "
            "does not split. Set it to 1."
        )
        return
    heads = math.gcd(model.num_attention_heads, architecture_of(model).key_value_heads(model))
    if heads % tensor == 0 and heads // tensor % context:
        yield (
            f"parallel.context: {context} does not divide the {heads // tensor} attention heads of a rank (of "
            f"{heads}, with parallel.tensor {tensor}). Set it to {either(divisors_near(heads // tensor, context))}."
        )
    multiple = context * (tensor if config.parallel.sequence else 1)
    if model.seq_length % multiple:
        yield (
            f"model.seq_length: {model.seq_length} is not a multiple of the {multiple} ranks that share its positions "
            f"(parallel.context {context}). {task_of(model).length_remedy(model, multiple)}, or parallel.context to 1."
        )


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    schedule, lr = config.optimizer.schedule, config.optimizer.lr
    if schedule.min_lr > lr:
        yield (
            f"optimizer.schedule.min_lr: {schedule.min_lr:g} is above optimizer.lr {lr:g}. Set it to at most {lr:g}."
        )
    if list(_length_problems(config)):
        return
    steps = _train_steps(config)
    if schedule.warmup_steps > steps:
        yield (
            f"optimizer.schedule.warmup_steps: {schedule.warmup_steps} is more than the run's {steps} steps. "
            f"Set it to at most {steps}; 1 % would be {math.ceil(steps / 100)}."
        )
    if config.checkpoint.keep_before_decay and schedule.type != "wsd":
        yield (
            f"checkpoint.keep_before_decay: true is for schedule type wsd only, but optimizer.schedule.type is "
            f"{schedule.type}. Set it to false, or the type to wsd."
        )
    if schedule.type != "wsd" and schedule.decay_shape != "linear":
        yield (
            f"optimizer.schedule.decay_shape: {schedule.decay_shape} is for schedule type wsd only, but "
            f"optimizer.schedule.type is {schedule.type}. Remove it, or set the type to wsd."
        )
    if schedule.type != "wsd":
        if schedule.decay_steps is not None:
            yield (
                f"optimizer.schedule.decay_steps: {schedule.decay_steps} is for schedule type wsd only, but "
                f"optimizer.schedule.type is {schedule.type}. Remove it, or set the type to wsd."
            )
    elif schedule.decay_steps is None:
        yield (
            "optimizer.schedule.decay_steps: wsd needs the number of its last, decaying steps. "
            f"Give it; 10 % would be {math.ceil(steps / 10)}."
        )
    elif schedule.warmup_steps + schedule.decay_steps > steps:
        yield (
            f"optimizer.schedule.decay_steps: {schedule.decay_steps} and optimizer.schedule.warmup_steps "
            f"{schedule.warmup_steps} are together more than the run's {steps} steps. Set decay_steps to at most "
            f"{max(0, steps - schedule.warmup_steps)}."
        )


def _task_problems(config: RunConfig) -> Iterator[str]:
    own, task = task_of(config.model), config.model.task
    for owner in TASKS.names():
        for key in TASKS[owner].own_keys:
            section, _, name = key.partition(".")
            value = getattr(getattr(config, section), name)
            default = type(getattr(config, section)).model_fields[name].get_default()
            if key not in own.own_keys and value != default:
                yield f"{key}: {value} means nothing to the task {task}. Remove it, or set model.task to {owner}."
    yield from own.run_problems(config)


def _run_problems(config: RunConfig) -> Iterator[str]:
    profile = config.training.profile
    if profile is not None and not list(_length_problems(config)):
        last, steps = profile.first_step + profile.num_steps - 1, _train_steps(config)
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
    yield from _evaluation_problems(config)
    if config.training.init_from is not None:
        if config.growth is not None:
            yield (
                f"training.init_from: {config.training.init_from}, but the weights are grown from growth.from "
                f"{config.growth.source}. Remove one of the two."
            )
        yield from _own_folder("training.init_from", config.training.init_from, config.run.dir, "other")
    if config.growth is not None:
        yield from _own_folder("growth.from", config.growth.source, config.run.dir, "smaller")
    if config.branch is not None:
        others = {"training.init_from": config.training.init_from, "growth": config.growth}
        for key in (key for key, value in others.items() if value is not None):
            yield (
                f"branch: the run goes on from {config.branch.source}, but {key} is given as well. Remove one of the "
                "two."
            )
        yield from _own_folder("branch.from", config.branch.source, config.run.dir, "other")


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


def _own_folder(key: str, source: str, run_dir: str, meant: str) -> Iterator[str]:
    """The run itself as what it is to begin with, also under another name."""
    own, place = os.path.realpath(run_dir), os.path.realpath(source)
    if place in (own, os.path.realpath(os.path.join(own, "checkpoints"))):
        yield (
            f"{key}: {source} is this run's own folder (run.dir {run_dir}). Give the {meant} run's folder, or another "
            "run.dir."
        )
