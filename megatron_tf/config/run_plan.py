"""How the ranks of a run share its work, as arithmetic. No torch, no process group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_tf.config.rules.batch import batch_problems, length_problems
from megatron_tf.config.rules.layout import layout_problems
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.topology import Topology
from megatron_tf.errors import raise_if_any


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of a step are split over ranks and micro batches, and how many steps the run has.

    global_batch_size = micro_batch_size × num_micro_batches × data_parallel.
    """

    micro_batch_size: int  # samples a rank computes at once
    num_micro_batches: int  # micro batches a rank accumulates into one step
    data_parallel: int
    seq_length: int  # tokens a sample
    train_steps: int  # number of the run's last step
    # The schedule is counted in steps of the size that the run began with; see `schedule_unit` of `plan_batches`.
    schedule_steps: float = 0.0  # its length
    schedule_from: tuple[int, float] = (0, 0.0)  # (a step number, the schedule's position at that step)
    schedule_pace: float = 1.0  # positions per step of the present size

    @property
    def global_batch_size(self) -> int:
        """Samples a step, over all ranks."""
        return self.micro_batch_size * self.num_micro_batches * self.data_parallel

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_length

    def schedule_position(self, step: int) -> float:
        """Position of the learning rate's schedule at the 0-based `step`, from 0 to `schedule_steps`."""
        first, position = self.schedule_from
        return position + (step - first) * self.schedule_pace

    @property
    def train_tokens(self) -> int:
        """Tokens of a whole run that never changes its batch."""
        return self.train_steps * self.tokens_per_step


@dataclass(frozen=True)
class RunPlan:
    """The grid of ranks, and the batches of a step."""

    topology: Topology
    batches: BatchPlan


def plan_run(
    config: RunConfig, world_size: int, step: int = 0, tokens: int = 0, schedule_unit: int | None = None
) -> RunPlan:
    """The plan from `step` on, of a run that has seen `tokens` tokens so far. For `schedule_unit` see `plan_batches`.

    ConfigError when the arithmetic has no solution.
    """
    return RunPlan(topology_for(config, world_size), plan_batches(config, world_size, step, tokens, schedule_unit))


def topology_for(config: RunConfig, world_size: int) -> Topology:
    """The rank grid; its data axis is world_size / (tensor × pipeline × context). ConfigError if that is not whole."""
    raise_if_any(layout_problems(config, world_size))
    parallel = config.parallel
    data = world_size // parallel.ranks_per_sample
    return Topology(parallel.tensor, parallel.pipeline, data, parallel.context, parallel.virtual_stages)


def plan_batches(
    config: RunConfig, world_size: int, step: int = 0, tokens: int = 0, schedule_unit: int | None = None
) -> BatchPlan:
    """Batch arithmetic of a run that has done `step` steps on `tokens` tokens so far.

    What is left of `training.train_tokens` or `train_samples` becomes whole steps of the present size, rounded up.
    `schedule_unit`: tokens of a step when the run began; None: the present number. The schedule, with its warm-up and
    decay, is counted in such steps, so that the learning rate does not jump when the batch size changes.
    With `training.train_steps` the schedule counts plain steps. ConfigError when the arithmetic has no solution.
    """
    data_parallel = topology_for(config, world_size).data
    raise_if_any([*batch_problems(config, data_parallel), *length_problems(config)])
    training = config.training
    train_steps = steps_to_train(config)
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


def evaluated_samples(config: RunConfig) -> int:
    """The number of validation samples of an evaluation, which takes whole global batches."""
    size = config.training.global_batch_size
    return math.ceil(config.evaluation.samples / size) * size


def below_trained(key: str, asked: int, trained: int) -> str:
    """The message on a length `asked` that is below what the run was `trained` for, both in the unit of `key`."""
    return (
        f"{key}: {asked:,}, and the run was trained for {trained:,} already: nothing is left to do, and its "
        f"checkpoints stay as they are. Set it to more than {trained} to go on, or choose another run.dir for a "
        "shorter run"
    )


def tokens_to_train(config: RunConfig) -> int | None:
    """The run's length in tokens, from training.train_tokens or train_samples; None when it is given in steps."""
    training = config.training
    if training.train_samples is not None:
        return training.train_samples * config.model.seq_length
    return training.train_tokens


def steps_to_train(config: RunConfig) -> int:
    """Steps of the run; requires that its length is given exactly once."""
    training = config.training
    if training.train_steps is not None:
        return training.train_steps
    tokens = tokens_to_train(config)
    assert tokens is not None
    return math.ceil(tokens / (training.global_batch_size * config.model.seq_length))
