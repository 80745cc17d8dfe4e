"""The engine that a configuration asks for. It is imported only when needed: DeepSpeed takes seconds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch

from megatron_tf.config.run_plan import BatchPlan, plan_batches, topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.config.topology import Topology
from megatron_tf.engine.base import Engine
from megatron_tf.parallel.groups import Group, make_group
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import NO_FACTS, join_ranks
from megatron_tf.state.sources import StateSource, initial_source


def join(
    configs: Iterable[RunConfig],
    environment: LaunchEnvironment,
    timeout_seconds: float,
    store_file: str | None = None,
    facts: Mapping[str, str] = NO_FACTS,
) -> torch.device:
    """Calls `join_ranks`, and attaches DeepSpeed if an engine of `configs` needs it. Returns this rank's device."""
    if any(config.parallel.engine == "deepspeed" for config in configs):
        from megatron_tf.engine.deepspeed import joining

        return joining.join(environment, timeout_seconds, store_file, facts)
    return join_ranks(environment, timeout_seconds, store_file, facts)


def initial_engine(config: RunConfig, world_size: int, timeout_seconds: float) -> Engine:
    """The engine of a new run on `world_size` ranks, at its initial weights. All ranks call it together."""
    topology, plan = topology_for(config, world_size), plan_batches(config, world_size)
    tensor = make_group(topology, "tensor", timeout_seconds)
    return build_engine(config, config.model, plan, topology, tensor, initial_source(config))


def build_engine(
    config: RunConfig,
    model: Model,
    plan: BatchPlan,
    topology: Topology,
    tensor: Group,
    source: StateSource,
    first_new: Mapping[str, int] | None = None,
    document_ends: Sequence[int] = (),
    new_layers: Collection[int] = (),
) -> Engine:
    """`model` and the weights, moments and τ of `source` must belong together. All ranks call it together.

    `tensor`: this rank's tensor-parallel group.
    `first_new`: for each tensor that the run's growth made bigger, the element where its new tokens begin.
    `document_ends`: the tokens after which attention begins anew.  `new_layers`: those that the run's growth added.
    """
    if config.parallel.engine == "torch":
        from megatron_tf.engine.torch.engine import TorchEngine

        return TorchEngine(config, model, plan, topology, tensor, source, first_new, document_ends, new_layers)
    from megatron_tf.engine.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine(config, model, plan, topology, tensor, source, first_new, document_ends, new_layers)
