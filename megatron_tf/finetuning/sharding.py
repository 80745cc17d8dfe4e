"""Base, tokens and moments over all ranks, each of which keeps a part: torch's `fully_shard`, one layer at a time.

A layer is whole on a rank only while it computes. Gradients of the tokens are summed, and each rank has those of its
part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.adapters.modules import layers_of


def shard(model: Any, device: torch.device) -> None:
    """Shards a base with its adapter, where there are several ranks; the parts go to `device`, and nothing else does.
    All ranks call it together."""
    if dist.get_world_size() == 1:
        model.to(device)
        return
    # imported where it is needed, because it takes as long as torch itself
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in (*layers_of(model.get_base_model()), model):
        module: Any = fully_shard(layer, mesh=mesh)
        # gradients are of the sum over the whole batch, and not a mean over ranks
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def whole(tensor: Any) -> Tensor:
    """A tensor that ranks have parts of, on each of them. All ranks call it together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_like(tensor: Tensor, parameter: Any) -> Tensor:
    """Of a whole tensor, which all ranks have, what this rank keeps of `parameter`."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def local(tensor: Any) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, whose class takes long to import."""
    return hasattr(tensor, "to_local")
