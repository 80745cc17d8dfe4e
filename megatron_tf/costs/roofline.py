"""The time of a step, estimated from its computation, its communication and the speeds of the hardware (a roofline).

A step takes M + P − 1 slots of the slowest stage, then the reduction of gradients and the update. M slots are the micro
batches. The other P − 1 are the bubble: at its beginning and end a stage waits for the P − 1 others. The bubble is
(P − 1)/(M + P − 1) of the slots; the (p − 1)/m of Narayanan et al. 2021 (arXiv:2104.04473) is the same number relative
to the work. With v parts of the depth on a rank, each wait is 1/v as long. A zero-bubble schedule computes weight
gradients, which take W of a slot, when a stage would otherwise wait. The bubble is then (P − 1)/v times (slot − 2W)
(ZB-H1: Qi et al. 2024, arXiv:2401.10241).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_tf.config.run_plan import plan_batches, topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.topology import GridAxis, Topology
from megatron_tf.costs.communication import (
    Collective,
    block_collectives,
    boundaries,
    context_collectives,
    data_collectives,
    ends_collectives,
    recomputed_collectives,
    stage_boundary,
    step_collectives,
    tied_gradients,
)
from megatron_tf.costs.estimate import flops_per_token, stage_parameters
from megatron_tf.costs.hardware import Assumptions, Gpu, group_bandwidth
from megatron_tf.costs.work import (
    Seconds,
    accumulation_seconds,
    block_seconds,
    ends_seconds,
    later_seconds,
    step_seconds,
    update_seconds,
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are spent on. Collectives that are marked as overlapped take no time; nothing else
    overlaps."""

    compute: float  # of the slowest stage, over all micro batches
    tensor: float  # communication of that stage's tensor group
    context: float  # communication of its context group
    pipeline: float  # sending hidden states and their gradients
    bubble: float  # waiting for other stages
    data: float  # reducing gradients, gathering weights
    update: float  # norm, clipping and the optimizer
    tokens: int
    flops: float  # of the model, for all tokens
    peak_flops: float  # of all GPUs

    @property
    def total(self) -> float:
        return self.compute + self.tensor + self.context + self.pipeline + self.bubble + self.data + self.update

    @property
    def communication_share(self) -> float:
        return (self.tensor + self.context + self.pipeline + self.data) / self.total

    @property
    def bubble_share(self) -> float:
        return self.bubble / self.total

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: recomputation does not count, attention counts in full."""
        return self.flops / (self.total * self.peak_flops)


def step_time(config: RunConfig, world_size: int, gpu: Gpu, assumed: Assumptions) -> StepTime:
    """Estimate for one optimizer step. `config` has passed `validate` for `world_size`."""
    topology, batches = topology_for(config, world_size), plan_batches(config, world_size)
    stages = {0, topology.pipeline - 1}  # the stages between have no layers of the task, and no more blocks
    slots = [_slot(config, topology, stage, gpu, assumed) for stage in stages]
    slot = max(slots, key=sum)
    compute, tensor, context, sending = slot
    later = topology.num_layers(config.model.num_layers, 0) * later_seconds(config, gpu, assumed)
    micro_batches = batches.num_micro_batches
    layers = max(topology.num_layers(config.model.num_layers, stage) for stage in stages)
    once = _seconds(step_collectives(config, micro_batches), topology.tensor, "tensor", topology, gpu, assumed)
    parameters = max(stage_parameters(config.model, topology, stage) for stage in stages)
    data = data_collectives(config, parameters, topology.replicas, micro_batches)
    tied = tied_gradients(config, topology)
    # Tied gradients go between the first and the last stage. That costs as much as between neighbours.
    end = _seconds(data, topology.replicas, "replicas", topology, gpu, assumed) + _seconds(
        tied, 2, "pipeline", topology, gpu, assumed
    )
    return StepTime(
        compute=micro_batches * compute + layers * step_seconds(config, micro_batches, gpu, assumed),
        tensor=micro_batches * tensor + layers * once,
        context=micro_batches * context,
        pipeline=micro_batches * sending,
        bubble=(topology.pipeline - 1) / topology.virtual_stages * (sum(slot) - 2 * later),
        data=end,
        update=update_seconds(parameters, config, topology.replicas, gpu, assumed),
        tokens=batches.tokens_per_step,
        flops=float(flops_per_token(config.model)) * batches.tokens_per_step,
        peak_flops=world_size * gpu.peak_flops(config.training.compute_type),
    )


def _slot(
    config: RunConfig, topology: Topology, stage: int, gpu: Gpu, assumed: Assumptions
) -> tuple[float, float, float, float]:
    """Seconds of one micro batch on a stage, forward and backward: (compute, tensor group, context group, sending)."""
    layers = topology.num_layers(config.model.num_layers, stage)
    work = block_seconds(config, gpu, assumed) * layers
    forward, backward = (
        _seconds(collectives, topology.tensor, "tensor", topology, gpu, assumed)
        for collectives in block_collectives(config)
    )
    sent = Seconds(forward, backward) * layers
    again = layers * _seconds(recomputed_collectives(config), topology.tensor, "tensor", topology, gpu, assumed)
    work_again = work.forward
    is_end = (stage == 0, stage == topology.pipeline - 1)
    for at_end, pair, seconds in zip(is_end, ends_collectives(config), ends_seconds(config, gpu, assumed)):
        if at_end:
            sent += Seconds(*(_seconds(c, topology.tensor, "tensor", topology, gpu, assumed) for c in pair))
            work += seconds
    compute = work.forward + work.backward
    compute += accumulation_seconds(stage_parameters(config.model, topology, stage), config, gpu, assumed)
    tensor = sent.forward + sent.backward
    exchanged = [
        layers * _seconds(c, topology.context, "context", topology, gpu, assumed) for c in context_collectives(config)
    ]
    context = sum(exchanged)
    if config.training.activation_checkpointing:
        compute, tensor, context = compute + work_again, tensor + again, context + exchanged[0]
    # An inner stage receives and sends hidden states and gradients one after the other: DeepSpeed's calls block.
    crossings = 2 * boundaries(topology)
    boundary = stage_boundary(config)
    sending = crossings * _seconds((boundary,), 2, "pipeline", topology, gpu, assumed)
    return compute, tensor, context, sending


def _seconds(
    collectives: Iterable[Collective], ranks: int, axis: GridAxis, topology: Topology, gpu: Gpu, assumed: Assumptions
) -> float:
    bandwidth, leaves_node = group_bandwidth(gpu, topology, axis)
    latency = assumed.network_latency if leaves_node else assumed.node_latency
    exposed = (c for c in collectives if not c.overlapped)
    return sum(c.count * latency + c.sent_bytes(ranks) / (assumed.link * bandwidth) for c in exposed)
