"""How the ranks of a run share its work: arithmetic alone, made once."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import BatchPlan, plan_batches, topology_for


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
