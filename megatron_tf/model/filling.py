"""Memory for weights that are written later, and random weights for layers that are used alone.

(The weights of a model come from `state.initialize` or from a checkpoint.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fill_normal(weight: Tensor, std: float) -> None:
    """Fills `weight` with normal numbers of mean 0. Skips the meta device, where torch would import its compiler."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def allocate(module: nn.Module, device: torch.device | str) -> None:
    """Gives the weights of `module`, made on the meta device, uninitialised memory on `device`.

    Does what `nn.Module.to_empty` does, without importing torch's compiler and sympy.
    """
    module._apply(lambda weight: torch.empty(weight.shape, dtype=weight.dtype, device=device))
