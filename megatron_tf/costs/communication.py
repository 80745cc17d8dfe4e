"""The communication of a step: every collective with its bytes, as a function of (s, b, d, T). Tests count the same.

`Collective.bytes` is the size of the whole tensor on a rank: the tensor of an all-reduce, the output of a gather, the
input of a scatter. A ring sends (T − 1)/T of it, twice for an all-reduce.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_tf.architectures.work import Collective, Collectives, Kind, compute_bytes, hidden_bytes, positions_of
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.run_plan import plan_batches, topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.tasks import task_of
from megatron_tf.config.topology import GridAxis, Topology
from megatron_tf.costs.estimate import largest_shard, stage_parameters
from megatron_tf.state.parameters import parameter_table


def block_collectives(config: RunConfig) -> tuple[Collectives, Collectives]:
    """(forward, backward) of one block and micro batch over the tensor group."""
    if config.parallel.tensor == 1:
        return (), ()
    return architecture_of(config.model).collectives(config)


def step_collectives(config: RunConfig, micro_batches: int) -> Collectives:
    """The other collectives of one block over the tensor group, in a step of `micro_batches` micro batches."""
    if config.parallel.tensor == 1:
        return ()
    forward, backward = architecture_of(config.model).step_collectives(config)
    if not config.training.compile:
        return forward + backward
    again = forward if config.training.activation_checkpointing else ()
    return micro_batches * (forward + again + backward)


def recomputed_collectives(config: RunConfig) -> Collectives:
    """The collectives of a block's forward pass that activation checkpointing repeats: all but the last, whose result
    the backward pass does not need."""
    forward, _ = block_collectives(config)
    end: Kind = "reduce_scatter" if config.parallel.sequence else "all_reduce"
    whole = hidden_bytes(config)
    return tuple(replace(c, count=c.count - 1) if (c.kind, c.bytes) == (end, whole) else c for c in forward)


def context_collectives(config: RunConfig) -> tuple[Collectives, Collectives]:
    """(forward, backward) of one block and micro batch over the context group; recomputation sends forward again.

    Query, key, value and the output of attention are exchanged.
    """
    if config.parallel.context == 1:
        return (), ()
    model = config.model
    own = hidden_bytes(config) // config.parallel.tensor
    shared = own * architecture_of(model).key_value_heads(model) // model.num_attention_heads
    exchanged = Collective("all_to_all", own, 2), Collective("all_to_all", shared, 2)
    return exchanged, exchanged


def ends_collectives(config: RunConfig) -> tuple[tuple[Collectives, Collectives], tuple[Collectives, Collectives]]:
    """((forward, backward) of the input layer, (forward, backward) of final norm, head and loss), for one micro batch.

    They run over the tensor group.
    """
    if config.parallel.tensor == 1:
        return ((), ()), ((), ())
    entry, (forward, backward) = task_of(config.model).collectives(config)
    if not config.parallel.sequence:
        return entry, (forward, backward)
    norm = Collective("all_reduce", config.model.hidden_size * compute_bytes(config.training.compute_type), 2)
    return entry, (forward, (*backward, norm))


def stage_boundary(config: RunConfig) -> Collective:
    """The message of one micro batch between two stages: hidden states, or their gradient in the other direction."""
    split = config.parallel.tensor if config.parallel.sequence else 1
    return Collective("send", hidden_bytes(config) // split)


def boundaries(topology: Topology) -> int:
    """The number of stage boundaries at which the busiest rank of a pipeline receives or sends hidden states."""
    if topology.pipeline == 1:
        return 0
    # With two ranks each is the first or the last, and such a rank has one boundary less.
    return 2 * topology.virtual_stages - (topology.pipeline == 2)


def sent_document_starts(config: RunConfig) -> Collective:
    """The starts of documents, one int32 for each token. They go with the hidden states, not with their gradients."""
    positions = positions_of(config)
    return Collective("send", 4 * positions if config.data.reset_at_eod else 0)


def data_collectives(config: RunConfig, parameters: int, replicas: int, num_micro_batches: int) -> Collectives:
    """The collectives of one step over the replicas, for the `parameters` of a rank. Gradients are sent in fp32.

    | engine              | gradients                         | parameters, in the compute type           |
    |---------------------|-----------------------------------|-------------------------------------------|
    | deepspeed, ZeRO 0   | all-reduce                        | none                                      |
    | deepspeed, ZeRO 1   | all-reduce                        | all-gather                                |
    | torch, `optimizer`  | reduce-scatter                    | all-gather                                |
    | torch, `gradients`  | reduce-scatter of each micro batch | all-gather of each micro batch            |
    | torch, `parameters` | reduce-scatter of each micro batch | all-gather of each micro batch and pass   |

    In a pipeline the torch engine sums the gradients of all micro batches locally and reduces them once.
    """
    if replicas == 1:
        return ()
    gradients = Collective("all_reduce", 4 * parameters)
    gathered = Collective("all_gather", compute_bytes(config.training.compute_type) * parameters)
    if config.parallel.engine == "deepspeed":
        return (gradients,) if config.zero.stage == 0 else (gradients, gathered)
    times = {"optimizer": (1, 1), "gradients": (1, 1), "parameters": (1, 2)}
    reductions, gatherings = times[config.parallel.shard]
    if config.parallel.shard != "optimizer":
        gatherings *= num_micro_batches
        reductions *= num_micro_batches if config.parallel.pipeline == 1 else 1
    return (
        Collective("reduce_scatter", 4 * parameters, reductions),
        replace(gathered, count=gatherings),
    )


def tied_gradients(config: RunConfig, topology: Topology) -> Collectives:
    """The all-reduces of a step between the first and the last stage: fp32 gradients of the weights that both hold."""
    if topology.pipeline == 1:
        return ()
    tied = (spec for spec in parameter_table(config.model).values() if spec.tied)
    return tuple(Collective("all_reduce", 4 * largest_shard(spec, topology.tensor)) for spec in tied)


def sent_bytes_per_step(config: RunConfig, world_size: int) -> dict[GridAxis, float]:
    """Bytes that the busiest stage's rank sends in a step over each axis of the grid. `config` is valid for
    `world_size`."""
    topology = topology_for(config, world_size)
    micro_batches = plan_batches(config, world_size).num_micro_batches
    layers = -(-config.model.num_layers // topology.pipeline)
    forward, backward = block_collectives(config)
    again_forward = config.training.activation_checkpointing
    again = recomputed_collectives(config) if again_forward else ()
    block = sum(c.sent_bytes(topology.tensor) for c in (*forward, *again, *backward))
    ends = ends_collectives(config)
    sides = ends if topology.pipeline == 1 else ends[1:]
    of_step = sum(c.sent_bytes(topology.tensor) for c in step_collectives(config, micro_batches))
    end = sum(c.sent_bytes(topology.tensor) for side in sides for pass_ in side for c in pass_)
    parameters = stage_parameters(config.model, topology, topology.pipeline - 1)
    data = data_collectives(config, parameters, topology.replicas, micro_batches)
    crossings = boundaries(topology)  # a rank sends hidden states at some of them, gradients at the others
    crossing = crossings * stage_boundary(config).bytes + (sent_document_starts(config).bytes if crossings else 0)
    out, back = context_collectives(config)
    exchanged = sum(c.sent_bytes(topology.context) for c in (*out, *(out if again_forward else ()), *back))
    return {
        "tensor": micro_batches * (layers * block + end) + layers * of_step,
        "pipeline": micro_batches * crossing + sum(c.sent_bytes(2) for c in tied_gradients(config, topology)),
        "data": sum(c.sent_bytes(topology.replicas) for c in data),
        **({"context": micro_batches * layers * exchanged} if topology.context > 1 else {}),
    }
