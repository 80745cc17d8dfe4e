"""A stage's parameters sharded over the replicas, the data- and context-parallel ranks, by torch's `fully_shard`.

Each parameter is cut by rows into chunks of equal size, the last ones smaller or empty. A rank keeps its chunk in fp32:
the master weight. The forward pass gathers whole parameters in the compute type, one block at a time; the backward pass
sums gradients in fp32, and leaves each rank the mean of its own chunk. While a block is at work the parameters of the
next one and the gradients of the last one are sent. A small stage computes too briefly to hide that, and is one piece.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tf.config.topology import Topology
from megatron_tf.engine.segmented import Fragment
from megatron_tf.engine.shards import ShardedParameter
from megatron_tf.model.stage import Stage
from megatron_tf.parallel.groups import Group, own_of

# parameters up to which a stage is one piece: 32 MiB of gradients
SMALL = 2**23


def shard(
    stage: Stage,
    replicas: Group,
    timeout_seconds: float,
    dtype: torch.dtype,
    device: torch.device,
    keep: bool,
    keep_gradients: bool,
) -> bool:
    """Shards `stage` over `replicas` and returns True. A single replica that computes in fp32 needs no sharding: False.

    `keep`: whether parameters stay whole between the forward and the backward pass. `keep_gradients`: whether they and
    the gradients stay whole until the end of the step. Then one piece takes no more memory than blocks.
    """
    if replicas.size == 1 and dtype == torch.float32:
        return False
    # imported only when needed, because it takes as long as torch itself
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # `fully_shard` needs a communicator even for a group of one
    handle = replicas.handle or own_of(([rank] for rank in range(dist.get_world_size())), timeout_seconds)
    assert handle is not None
    # No block changes its hidden states in place, so that some leave it as a view does no harm.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = DeviceMesh.from_group(handle, device.type)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    one_piece = keep_gradients and sum(parameter.numel() for parameter in stage.parameters()) <= SMALL
    for block in () if one_piece else stage.blocks.values():
        fully_shard(block, mesh=mesh, reshard_after_forward=not keep, mp_policy=policy)
    fully_shard(stage, mesh=mesh, reshard_after_forward=not keep, mp_policy=policy)
    return True


def set_last_backward(stage: Any, last: bool, keep: bool) -> None:
    """Must be called before each backward pass of a stage that `shard` has sharded.

    `last`: of the step. `keep`: whether parameters and gradients stay whole until then.
    """
    stage.set_is_last_backward(last)
    stage.set_requires_gradient_sync(last or not keep)
    stage.set_reshard_after_backward(last or not keep)


def add_up(stage: nn.Module) -> None:
    """Adds gradients that were written to `.grad` of whole parameters outside of a backward pass to the fp32 sums."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if isinstance(stage, FSDPModule):
        for state in fully_shard.state(stage)._state_ctx.all_states:  # type: ignore[attr-defined]
            for group in state._fsdp_param_groups:
                group.post_backward()


def fragment(shard: ShardedParameter, replicas: Group) -> Fragment | None:
    """Where this rank keeps the shard's fp32 state; None where its chunk is empty."""
    parameter: Any = shard.parameter
    width = shard.spec.width
    first = shard.first_row * width
    if not _is_sharded(parameter):
        return Fragment(shard.spec, parameter, first, first + parameter.numel(), 0, shard.owned)
    local = parameter.to_local().detach()
    rows = parameter.shape[0]
    begin = min(replicas.rank * -(-rows // replicas.size), rows)
    assert local.shape[0] == min(-(-rows // replicas.size), rows - begin), (
        "fully_shard cuts by rows, as torch.chunk does"
    )
    start = first + begin * width
    return Fragment(shard.spec, local, start, start + local.numel(), 0, shard.owned) if local.numel() else None


def gradient(parameter: nn.Parameter) -> Tensor | None:
    """This rank's chunk of the final gradient."""
    grad: Any = parameter.grad
    return grad.to_local() if _is_sharded(grad) else grad


def _is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. It asks for an attribute, because the class takes long to import."""
    return hasattr(tensor, "to_local")


def tied_group(topology: Topology, timeout_seconds: float) -> dist.ProcessGroup | None:
    """The group of the first and the last stage of this rank's pipeline; None on other stages. All ranks call it."""
    return own_of([(ranks[0], ranks[-1]) for ranks in topology.groups("pipeline")], timeout_seconds)


def row_group(topology: Topology, tensor: Group, replicas: Group, timeout_seconds: float) -> Group:
    """All ranks of one stage, in the order of the world. All ranks call it together."""
    if replicas.size == 1:
        return tensor
    if tensor.size == 1:
        return replicas
    size = topology.tensor * topology.replicas
    stages = [range(first, first + size) for first in range(0, topology.world_size, size)]
    return Group(size, dist.get_rank() % size, own_of(stages, timeout_seconds))


def gradients(shards: Iterable[ShardedParameter]) -> Iterator[tuple[ShardedParameter, Tensor]]:
    """(Parameter, this rank's chunk of its final gradient) for the parameters that have one."""
    for shard_ in shards:
        grad = gradient(shard_.parameter)
        if grad is not None:
            yield shard_, grad
