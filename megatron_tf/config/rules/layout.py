"""Rules between the model and the ranks that share it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.nearest import divisors, divisors_near, either, multiples_near
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.tasks import task_of
from megatron_tf.telemetry.text import count_of


def layout_problems(config: RunConfig, world_size: int) -> Iterator[str]:
    parallel = config.parallel
    axes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline}
    if parallel.context > 1:
        axes["context"] = parallel.context
    ranks = parallel.ranks_per_sample
    if world_size % ranks:
        yield (
            f"parallel: {' × '.join(f'{axis} {size}' for axis, size in axes.items())} needs a multiple of {ranks} "
            f"ranks, but there are {world_size}. Start {either(multiples_near(world_size, ranks))} ranks, or choose "
            f"{' × '.join(f'parallel.{axis}' for axis in axes)} to be {either(divisors(world_size))}."
        )


def stage_problems(config: RunConfig) -> Iterator[str]:
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


def sharding_problems(config: RunConfig) -> Iterator[str]:
    model, tensor = config.model, config.parallel.tensor
    if model.num_attention_heads % tensor:
        yield (
            f"parallel.tensor: {tensor} does not divide model.num_attention_heads {model.num_attention_heads}. "
            f"Set it to {either(architecture_of(model).tensor_sizes_near(model, tensor))}."
        )
    rows = architecture_of(model).sharded_rows(model)
    for key, count in {**task_of(model).sharded_rows(model), **rows}.items():
        if count < tensor:
            yield (
                f"{key}: {count_of(count, 'row')} cannot be split over parallel.tensor {tensor} ranks. "
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
            f"{task_of(model).length(model)} not a multiple of parallel.tensor {tensor}, which "
            f"parallel.sequence needs. {task_of(model).length_remedy(model, tensor)}, or parallel.sequence to false."
        )


def _context_problems(config: RunConfig) -> Iterator[str]:
    """Context ranks split the positions of a sample outside attention, and the heads within it."""
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
    shared_by = f"parallel.context {context}" + (f" × parallel.tensor {tensor}" if multiple > context else "")
    if model.seq_length % multiple:
        yield (
            f"{task_of(model).length(model)} not a multiple of the {multiple} ranks that share its positions "
            f"({shared_by}). {task_of(model).length_remedy(model, multiple)}, or parallel.context to 1."
        )
