"""Reports everything that cannot run, at once and before anything is started. No torch, no process group."""

from __future__ import annotations

from megatron_tf.config.rules.batch import batch_problems, length_problems
from megatron_tf.config.rules.engine import (
    engine_problems,
    loss_scale_problems,
    lr_rule_problems,
    matrix_problems,
    pipeline_problems,
    zero_problems,
)
from megatron_tf.config.rules.layout import layout_problems, sharding_problems, stage_problems
from megatron_tf.config.rules.model import model_problems
from megatron_tf.config.rules.run import run_problems, task_problems
from megatron_tf.config.rules.schedule import schedule_problems
from megatron_tf.config.rules.start import start_problems
from megatron_tf.config.run_plan import BatchPlan, plan_batches, tokens_to_train, topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import raise_if_any

# the numbers that follow from a valid configuration can be imported from here as well
__all__ = ["BatchPlan", "check_model", "plan_batches", "tokens_to_train", "validate", "validate_layout"]


def validate(config: RunConfig, world_size: int) -> None:
    """Raise one ConfigError with everything that cannot run on `world_size` ranks; each with its remedy."""
    problems = list(layout_problems(config, world_size))
    if not problems:
        data_parallel = topology_for(config, world_size).data
        for needs_layout in (batch_problems, pipeline_problems, matrix_problems):
            problems += needs_layout(config, data_parallel)
    problems += [*length_problems(config), *model_problems(config.model)]
    for rule in (
        stage_problems,
        sharding_problems,
        schedule_problems,
        engine_problems,
        zero_problems,
        loss_scale_problems,
        lr_rule_problems,
        task_problems,
        run_problems,
        start_problems,
    ):
        problems += rule(config)
    raise_if_any(problems)


def validate_layout(config: RunConfig, world_size: int) -> None:
    """Raise one ConfigError unless the model can be spread over `world_size` ranks, whatever the run's batch is."""
    raise_if_any(
        [
            *layout_problems(config, world_size),
            *model_problems(config.model),
            *stage_problems(config),
            *sharding_problems(config),
        ]
    )


def check_model(model: Model) -> None:
    """Raise one ConfigError unless a network can be built of `model`, the range of each field being checked already."""
    raise_if_any(model_problems(model))
