"""Deferred gradients of weights. The backward pass computes only those of inputs, for which other ranks wait.

While it runs, each layer adds to a `Later` a function that computes its gradients of weights. Together, the pass and
those functions compute the same products as an ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


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
                for weight, gradient in zip(weights, gradients()):
                    if weight.requires_grad:
                        torch.autograd.backward(weight, gradient)

        return finish


class _Product(Function):
    @staticmethod
    def forward(ctx, x, weight, later, transposed):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.later, ctx.transposed = weight, later, transposed
        return x @ (weight if transposed else weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        pair = (x, grad) if ctx.transposed else (grad, x)
        ctx.later.add([ctx.weight], lambda: [pair[0].flatten(0, -2).mT @ pair[1].flatten(0, -2)])
        return grad @ (weight.mT if ctx.transposed else weight), None, None, None


def product(x: Tensor, weight: Tensor, later: Later, transposed: bool = False) -> Tensor:
    """x [..., k] times the leaf `weight`, [n, k], or [k, n] if `transposed` -> [..., n].

    The backward pass defers the gradient of `weight` to `later`.
    """
    return _Product.apply(x, weight, later, transposed)
