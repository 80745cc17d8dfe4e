"""Rules between the engine, its sections, the precision, the pipeline's schedule and the optimizer."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.nearest import divisors, either, multiples_near
from megatron_tf.config.optimizers import rule_of
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.optimizer import OF_CANDIDATES
from megatron_tf.config.sections.parallel import Parallel
from megatron_tf.optimizers.base import MatrixRule


def engine_problems(config: RunConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.engine == "deepspeed":
        for key, usual in (("shard", "optimizer"), ("schedule", "1f1b"), ("virtual_stages", 1), ("context", 1)):
            if getattr(parallel, key) != usual:
                yield (
                    f"parallel.{key}: {getattr(parallel, key)} needs parallel.engine: torch, and it is deepspeed. "
                    f"Set parallel.engine to torch, or parallel.{key} to {usual}."
                )
        return
    if config.zero.stage != 1:
        yield (
            f"zero.stage: {config.zero.stage} is for parallel.engine: deepspeed, and it is torch, which shards what "
            "parallel.shard says. Leave out zero.stage."
        )
    unused = config.deepspeed
    if config.training.precision == "fp16":
        # the loss scale has these settings under both engines
        unused = unused.model_copy(update={"fp16": type(unused.fp16)()})
    if unused != type(unused)():
        yield (
            "deepspeed: this section has no effect with parallel.engine: torch, but for deepspeed.fp16 with "
            "training.precision fp16. Leave it out."
        )


def pipeline_problems(config: RunConfig, data_parallel: int) -> Iterator[str]:
    parallel, training = config.parallel, config.training
    samples = training.micro_batch_size * data_parallel
    micro_batches = training.global_batch_size // samples
    if parallel.engine != "torch":
        return
    if parallel.virtual_stages > 1:
        yield from _interleaving_problems(parallel, micro_batches, samples)
    if parallel.pipeline == 1:
        if parallel.schedule != "1f1b":
            yield (
                f"parallel.schedule: {parallel.schedule} is an order of micro batches in a pipeline, and "
                "parallel.pipeline is 1. Set parallel.schedule to 1f1b, or parallel.pipeline to 2 or more."
            )
        return
    if parallel.schedule == "zero_bubble":
        yield from _zero_bubble_problems(config, micro_batches, samples)
    fits_batch = training.global_batch_size % samples == 0  # else `batch_problems` has sentences on it
    if parallel.schedule != "gpipe" and micro_batches < parallel.pipeline and fits_batch:
        share = training.global_batch_size // data_parallel
        needs_multiple = parallel.virtual_stages > 1 or parallel.schedule == "zero_bubble"
        multiple = parallel.pipeline if needs_multiple else 1
        sizes = [
            size for size in divisors(share) if share // size >= parallel.pipeline and share // size % multiple == 0
        ]
        ways = [] if parallel.virtual_stages > 1 else ["it to gpipe"]
        if sizes:
            ways.append(f"training.micro_batch_size to {either(sizes[-3:])}")
        ways.append(f"training.global_batch_size to {samples * parallel.pipeline}")
        yield (
            f"parallel.schedule: {parallel.schedule} needs a micro batch for each of parallel.pipeline "
            f"{parallel.pipeline} stages, and a step has {micro_batches} of them. Set {', or '.join(ways)}."
        )


def _interleaving_problems(parallel: Parallel, micro_batches: int, samples: int) -> Iterator[str]:
    """`micro_batches`: per rank and step. `samples`: in one micro batch, over all data-parallel ranks."""
    stages, parts = parallel.pipeline, parallel.virtual_stages
    if stages == 1:
        yield (
            f"parallel.virtual_stages: {parts} needs a pipeline, and parallel.pipeline is 1. Set "
            "parallel.virtual_stages to 1, or parallel.pipeline to 2."
        )
    elif parallel.schedule == "gpipe":
        yield (
            f"parallel.virtual_stages: {parts} needs parallel.schedule: 1f1b or zero_bubble, and it is gpipe. Set "
            "parallel.schedule to 1f1b, or parallel.virtual_stages to 1."
        )
    elif micro_batches > stages and micro_batches % stages:
        near = [samples * number for number in multiples_near(micro_batches, stages)]
        yield (
            f"parallel.virtual_stages: {parts} needs micro batches in multiples of parallel.pipeline {stages}, and a "
            f"step has {micro_batches} of them. Set training.global_batch_size to {either(near)}, or "
            "parallel.virtual_stages to 1."
        )


def _zero_bubble_problems(config: RunConfig, micro_batches: int, samples: int) -> Iterator[str]:
    """`micro_batches`: per rank and step. `samples`: in one micro batch, over all data-parallel ranks."""
    parallel, training = config.parallel, config.training
    if training.compile:
        yield (
            "parallel.schedule: zero_bubble leaves gradients of weights for later, and training.compile: true compiles "
            "them into one pass with the others. Set training.compile to false, or parallel.schedule to 1f1b."
        )
    if training.scores == "recompute":
        yield (
            "parallel.schedule: zero_bubble keeps scores for the gradients of weights, and training.scores: recompute "
            "keeps none. Set training.scores to keep, or parallel.schedule to 1f1b."
        )
    stages = parallel.pipeline
    if parallel.virtual_stages == 1 and micro_batches > stages and micro_batches % stages:
        near = [samples * number for number in multiples_near(micro_batches, stages)]
        yield (
            f"parallel.schedule: zero_bubble needs micro batches in multiples of parallel.pipeline {stages}, and a "
            f"step has {micro_batches} of them. Set training.global_batch_size to {either(near)}, or "
            "parallel.schedule to 1f1b."
        )


def matrix_problems(config: RunConfig, data_parallel: int) -> Iterator[str]:
    if not isinstance(rule_of(config.optimizer), MatrixRule) or config.parallel.engine != "deepspeed":
        return
    if config.zero.stage and data_parallel > 1:
        unsharded = config.model_copy(update={"zero": config.zero.model_copy(update={"stage": 0})})
        ways = ["parallel.engine to torch", "zero.stage to 0", "optimizer.type to adamw"]
        if any(zero_problems(unsharded)):
            ways.remove("zero.stage to 0")
        yield (
            f"optimizer.type: {config.optimizer.type} updates whole rows, and zero.stage {config.zero.stage} of "
            f"parallel.engine: deepspeed cuts them between {data_parallel} data-parallel ranks. Set {either(ways)}."
        )


def lr_rule_problems(config: RunConfig) -> Iterator[str]:
    if architecture_of(config.model).token_counts(config.model):
        return
    if config.optimizer.lr_rule is not None:
        yield (
            f"optimizer.lr_rule: is given, but a {config.model.architecture} has no parameter tokens. Set it to null, "
            "and tune optimizer.lr for each size."
        )
    for key in OF_CANDIDATES:
        if (factor := getattr(config.optimizer, key)) not in (None, 1):
            yield (
                f"optimizer.{key}: is {factor:g}, but a {config.model.architecture} has no candidates. Set it to null."
            )


def zero_problems(config: RunConfig) -> Iterator[str]:
    if config.zero.stage != 0 or config.parallel.engine == "torch":
        return
    remedy = "Set zero.stage to 1"
    reasons = {
        "bf16": "DeepSpeed does not implement it with fp32 accumulation of bf16 gradients",
        "fp16": "DeepSpeed's results are then wrong, even on one rank",
    }
    training = config.training
    if training.compute_type in reasons:
        yield (
            f"zero.stage: 0 with training.precision {training.precision} is refused, because "
            f"{reasons[training.compute_type]}. "
            f"{remedy}, or training.precision to fp32."
        )
    if config.parallel.pipeline > 1:
        yield (
            f"zero.stage: 0 with parallel.pipeline {config.parallel.pipeline} is refused, because DeepSpeed then "
            f"leaves parameters of later stages out of the gradient norm. {remedy}, or parallel.pipeline to 1."
        )


def loss_scale_problems(config: RunConfig) -> Iterator[str]:
    fp16 = config.deepspeed.fp16
    first = 2**fp16.initial_scale_power
    if fp16.min_loss_scale > first:
        yield (
            f"deepspeed.fp16.min_loss_scale: {fp16.min_loss_scale} is above the first loss scale, {first}, which is 2 "
            f"to the power of deepspeed.fp16.initial_scale_power {fp16.initial_scale_power}. Set it to at most {first}."
        )
