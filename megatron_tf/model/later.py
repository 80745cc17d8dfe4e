"""Gradients of weights that a backward pass leaves for later: it makes those of inputs, which other ranks wait for.

A layer adds its share to a `Later` while the backward pass runs, with what the products need. Together both make what
one pass would make, by the same products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Later:
    """What the backward passes of some layers have left so far."""

    def __init__(self) -> None:
        self._left: list[tuple[Sequence[Tensor], Callable[[], Sequence[Tensor]]]] = []

    def add(self, weights: Sequence[Tensor], gradients: Callable[[], Sequence[Tensor]]) -> None:
        """`weights`: leaves.  `gradients`: makes one for each of them."""
        self._left.append((weights, gradients))

    def take(self) -> Callable[[], None]:
        """A function that makes what has been left so far, and adds it to the weights' gradients."""
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
    """x [..., k] times a matrix, a leaf [n, k], or [k, n] if `transposed` -> [..., n].

    The backward pass leaves the gradient of `weight` to `later`.
    """
    return _Product.apply(x, weight, later, transposed)
