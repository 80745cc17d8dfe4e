"""Deferred gradients of weights. The backward pass computes only those of inputs, for which other ranks wait.

While it runs, each layer adds to a `Later` a function that computes its gradients of weights. Together, the pass and
those functions compute the same products as an ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Later:
    """The gradients of weights that backward passes have deferred so far."""

    def __init__(self) -> None:
        self._left: list[tuple[Sequence[Tensor], Callable[[], Sequence[Tensor]]]] = []

    def add(self, weights: Sequence[Tensor], gradients: Callable[[], Sequence[Tensor]]) -> None:
        """Defers gradients. `weights`: leaf tensors.  `gradients`: a function that computes one for each of them."""
        self._left.append((weights, gradients))

    def take(self) -> Callable[[], None]:
        """Returns a function that computes the gradients deferred so far and accumulates them. Empties this object."""
        left, self._left = self._left, []

        def finish() -> None:
            while left:
                weights, gradients = left.pop()
                with torch.no_grad():
                    made = gradients()
                for weight, gradient in zip(weights, made):
                    if weight.requires_grad:
                        torch.autograd.backward(weight, gradient)

        return finish
