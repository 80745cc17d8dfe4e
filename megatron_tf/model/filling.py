"""Random weights of layers that stand alone. (A model's come from `state.initialize`, or from a checkpoint.)"""

from __future__ import annotations

from torch import Tensor, nn


def fill_normal(weight: Tensor, std: float) -> None:
    """Normal numbers of mean 0, in place. On the meta device nothing: torch would import its compiler to do that."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)
