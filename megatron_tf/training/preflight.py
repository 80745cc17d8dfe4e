"""All checks that are possible before the ranks meet, reported at once: a mistake then costs seconds, not a queue."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch

from megatron_tf.config.machine import machine_problems
from megatron_tf.config.nearest import either
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.validate import validate
from megatron_tf.costs.estimate import memory_per_rank
from megatron_tf.data.outlook import tokenizer_problem
from megatron_tf.engine.device import accelerator_problems, engine_problems, precision_problems
from megatron_tf.errors import ConfigError
from megatron_tf.growth.rules import chain_problems
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.state.parameters import candidate_counts

GIB = 2**30
# Activations are an estimate, which may be off by this factor.
MARGIN = 2


def preflight(stages: Sequence[RunConfig], environment: LaunchEnvironment) -> None:
    """ConfigError with everything that is wrong with `stages`, or with this machine for them."""
    memory = available_memory(environment.local_world_size or 1)
    wrong: list[str] = []
    wrong_accelerator = list(accelerator_problems(os.environ))
    lacking = [*wrong_accelerator]
    for config in stages:
        stage = f"stage {config.run.name}: " if len(stages) > 1 else ""
        try:
            validate(config, environment.world_size)
        except ConfigError as error:
            wrong += [stage + problem for problem in error.problems]
        else:
            lacking += [stage + problem for problem in memory_problems(config, environment.world_size, memory)]
        lacking += [stage + problem for problem in machine_problems(config)]
        lacking += [stage + problem for problem in [tokenizer_problem(config)] if problem]
        not_installed = [stage + problem for problem in engine_problems(config)]
        lacking += not_installed
        if not wrong_accelerator and not not_installed:
            lacking += [stage + problem for problem in precision_problems(config)]
    wrong += chain_problems(stages)
    if wrong or lacking:
        raise ConfigError(wrong + lacking)


def memory_problems(config: RunConfig, world_size: int, available: int) -> Iterator[str]:
    """A problem for a run that surely needs more than `available` bytes on a rank. `config` has passed `validate` for
    `world_size`."""
    memory = memory_per_rank(config, world_size)
    state = memory.weights + memory.gradients + memory.optimizer
    candidates = [f"model.sparse.{kind}.candidates" for kind in candidate_counts(config.model)]
    if state > available or memory.total > MARGIN * available:
        yield (
            f"model: a rank needs about {memory.total / GIB:,.1f} GiB ({state / GIB:,.1f} GiB for weights, gradients "
            f"and optimizer, {memory.activations / GIB:,.1f} GiB for activations), but it has {available / GIB:,.1f} "
            "GiB. Raise parallel.tensor or parallel.pipeline with more ranks, lower "
            f"{either(['training.micro_batch_size', *candidates])}, or make the model smaller."
        )


def available_memory(ranks_on_node: int) -> int:
    """Bytes for each of the ranks on this machine: a GPU's, or a share of the RAM."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return physical_memory() // ranks_on_node


def physical_memory() -> int:
    """Bytes of RAM of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
