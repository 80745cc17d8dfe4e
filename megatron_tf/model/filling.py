"""Memory for weights that are written later, and random weights of layers that stand alone.

(A model's come from `state.initialize`, or from a checkpoint.)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fill_normal(weight: Tensor, std: float) -> None:
    """Normal numbers of mean 0, in place. On the meta device nothing: torch would import its compiler to do that."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


def allocate(module: nn.Module, device: torch.device | str) -> None:
    """Gives the weights of `module`, made on the meta device, memory on `device`, still to be written.

    As `nn.Module.to_empty`, which asks torch's compiler how the memory is to be laid out, and imports sympy for it.
    """
    module._apply(lambda weight: torch.empty(weight.shape, dtype=weight.dtype, device=device))
