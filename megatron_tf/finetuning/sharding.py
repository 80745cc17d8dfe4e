"""Base, tokens and moments sharded over all ranks, by torch's `fully_shard` on each layer.

A layer is whole on a rank only while it is computed. The gradients of the tokens are summed over ranks and scattered:
each rank has those of its part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.adapters.modules import layers_of


def shard(model: Any, device: torch.device) -> None:
    """Shards a base with its adapter over all ranks, and moves only this rank's part to `device`. A single rank gets
    the whole model. All ranks call it together."""
    if dist.get_world_size() == 1:
        model.to(device)
        return
    # imported only when needed, because it takes as long as torch itself
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in (*layers_of(model.get_base_model()), model):
        module: Any = fully_shard(layer, mesh=mesh)
        # each rank's loss is divided by the tokens of the whole batch already, so gradients are summed, not averaged
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def whole(tensor: Any) -> Tensor:
    """The whole tensor, on every rank. All ranks call it together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def part_like(tensor: Tensor, parameter: Any) -> Tensor:
    """This rank's part of a whole tensor that all ranks have, sharded and placed as `parameter` is."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def local(tensor: Any) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. It asks for an attribute, because the class takes long to import."""
    return hasattr(tensor, "to_local")
