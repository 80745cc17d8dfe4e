"""The cost of a chain of growths, compared with training each of its sizes from scratch to the same loss.

The number of tokens that a size needs from scratch is only known after a run. It is D₂ + κ·D₁ (see `law`): the tokens
of the stage itself, plus κ for each token of the stages before it. So every comparison is a function of κ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.schema import RunConfig
from megatron_tf.costs.estimate import flops_per_token, num_parameters
from megatron_tf.costs.law import ASSUMED_KAPPA, Range
from megatron_tf.costs.layouts import Estimate
from megatron_tf.errors import ConfigError


@dataclass(frozen=True)
class StageCost:
    """The cost of one stage. GPU-hours are summed over all GPUs and do not contain losses by failures.

    `chain_*`: this stage and all before it: the cost of a model of this size by growing. If the next stage grows from
        before the decay of a stage, the sums of the later stages leave that decay out: it serves its own size alone.
    `scratch_*`: the same model from scratch to the same loss at the same speed, at the least and the greatest κ.
    `ratio`: R, chain_flops over scratch_flops, least and greatest.
    `kappa`: the least and greatest κ behind these numbers.  `break_even`: the κ above which R is below 1.  Both are
        None for the first stage, which is trained from scratch itself.
    """

    name: str
    parameters: int
    tokens: int
    flops: float
    gpu_hours: float
    chain_tokens: int
    chain_flops: float
    chain_gpu_hours: float
    scratch_tokens: Range
    scratch_flops: Range
    scratch_gpu_hours: Range
    ratio: Range
    kappa: Range | None
    break_even: float | None


def chain_costs(
    stages: Sequence[Estimate], kappa: Range = ASSUMED_KAPPA, scratch_tokens: int | None = None
) -> list[StageCost]:
    """The cost of each stage, in order.

    `kappa`: least and greatest.  `scratch_tokens`: tokens that each size needs from scratch. If given, κ is computed
    from it and `kappa` is not used. ConfigError when that κ would be negative.
    """
    if scratch_tokens is not None:
        _check_worth(stages, scratch_tokens)
    costs: list[StageCost] = []
    # sums over the stages before the current one
    earlier_tokens, earlier_flops, earlier_hours = 0, 0.0, 0.0
    for stage, after in zip(stages, [*stages[1:], None]):
        batches = plan_batches(stage.config, stage.world_size)
        tokens = batches.train_tokens
        per_token = float(flops_per_token(stage.config.model))
        hours = stage.world_size / stage.time.tokens_per_second / 3600  # a token
        worth, scratch = _from_scratch(tokens, earlier_tokens, kappa, scratch_tokens)
        chain_flops = per_token * tokens + earlier_flops
        costs.append(
            StageCost(
                name=stage.config.run.name,
                parameters=num_parameters(stage.config.model),
                tokens=tokens,
                flops=per_token * tokens,
                gpu_hours=hours * tokens,
                chain_tokens=tokens + earlier_tokens,
                chain_flops=chain_flops,
                chain_gpu_hours=hours * tokens + earlier_hours,
                scratch_tokens=scratch,
                scratch_flops=(per_token * scratch[0], per_token * scratch[1]),
                scratch_gpu_hours=(hours * scratch[0], hours * scratch[1]),
                ratio=(chain_flops / (per_token * scratch[1]), chain_flops / (per_token * scratch[0])),
                kappa=worth,
                break_even=earlier_flops / earlier_tokens / per_token if earlier_tokens else None,
            )
        )
        left_out = 0 if after is None else left_out_steps(stage.config, after.config)
        passed_on = tokens - left_out * batches.tokens_per_step
        earlier_tokens += passed_on
        earlier_flops += per_token * passed_on
        earlier_hours += hours * passed_on
    return costs


def left_out_steps(stage: RunConfig, after: RunConfig) -> int:
    """Steps of the decay of `stage` if `after` grows from before that decay; else 0."""
    growth, decay = after.growth, stage.optimizer.schedule.decay_steps
    return 0 if growth is None or growth.at != "before_decay" or decay is None else decay


def _check_worth(stages: Sequence[Estimate], scratch_tokens: int) -> None:
    own = {stage.config.run.name: plan_batches(stage.config, stage.world_size).train_tokens for stage in stages[1:]}
    longest = max(own, key=own.__getitem__)
    if scratch_tokens < own[longest]:
        raise ConfigError(
            f"--scratch-tokens: {scratch_tokens:,}, but stage {longest} trains on {own[longest]:,} tokens of its own, "
            f"so what came before it would be worth less than nothing. Give {own[longest]:,} or more."
        )


def _from_scratch(tokens: int, earlier: int, kappa: Range, scratch_tokens: int | None) -> tuple[Range | None, Range]:
    """(least and greatest κ of a stage, None for the first one; least and most tokens of its model from scratch)."""
    if earlier == 0:
        own = float(scratch_tokens or tokens)
        return None, (own, own)
    if scratch_tokens is not None:
        implied = (scratch_tokens - tokens) / earlier
        kappa = (implied, implied)
    # A measured κ below 0 means that the model from scratch needed fewer tokens than the stage itself.
    least, most = (max(tokens + worth * earlier, 1.0) for worth in kappa)
    return kappa, (least, most)
