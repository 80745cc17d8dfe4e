"""What a chain of growths costs, compared with training each of its sizes from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tf.config.validate import plan_batches
from megatron_tf.costs.estimate import flops_per_token, num_parameters
from megatron_tf.costs.layouts import Estimate


@dataclass(frozen=True)
class StageCost:
    """One stage. GPU-hours are of all GPUs, without what failures cost.

    `chain_*`: of this stage and all before it, that is what a model of this size costs by growing.
    `scratch_*`: of the same model trained on `scratch_tokens` tokens at the same speed.
    """

    name: str
    parameters: int
    tokens: int
    flops: float
    gpu_hours: float
    chain_tokens: int
    chain_flops: float
    chain_gpu_hours: float
    scratch_tokens: int
    scratch_flops: float
    scratch_gpu_hours: float


def chain_costs(stages: Sequence[Estimate], scratch_tokens: int | None = None) -> list[StageCost]:
    """One entry a stage, in order.

    `scratch_tokens` None: as many as the first stage, which is itself trained from scratch, is trained on.
    """
    costs: list[StageCost] = []
    for stage in stages:
        tokens = plan_batches(stage.config, stage.world_size).train_tokens
        scratch = scratch_tokens or (costs[0].tokens if costs else tokens)
        per_token = flops_per_token(stage.config.model)
        hours = stage.world_size / stage.time.tokens_per_second / 3600  # a token
        before = costs[-1] if costs else None
        costs.append(
            StageCost(
                name=stage.config.run.name,
                parameters=num_parameters(stage.config.model),
                tokens=tokens,
                flops=float(per_token) * tokens,
                gpu_hours=hours * tokens,
                chain_tokens=tokens + (before.chain_tokens if before else 0),
                chain_flops=float(per_token) * tokens + (before.chain_flops if before else 0),
                chain_gpu_hours=hours * tokens + (before.chain_gpu_hours if before else 0),
                scratch_tokens=scratch,
                scratch_flops=float(per_token) * scratch,
                scratch_gpu_hours=hours * scratch,
            )
        )
    return costs
