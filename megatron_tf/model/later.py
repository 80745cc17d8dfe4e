"""Products with a weight, and deferred gradients of weights.

With deferred gradients the backward pass computes only the gradients of inputs, for which other ranks wait. While it
runs, each layer adds to a `Later` a function that computes its gradients of weights. Together, the pass and those
functions compute the same products as an ordinary backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.model.kernels import onednn
from megatron_tf.model.products import multiply


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


class _Product(Function):
    @staticmethod
    def forward(ctx, x, weight, later, transposed):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.later, ctx.transposed = weight, later, transposed
        return multiply(x, weight if transposed else weight.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        pair = (x, grad) if ctx.transposed else (grad, x)
        d_weight = None
        if ctx.later is not None:
            ctx.later.add([ctx.weight], lambda: [_weight_gradient(*pair)])
        elif ctx.needs_input_grad[1]:
            d_weight = _weight_gradient(*pair)
        d_x = multiply(grad, weight.mT if ctx.transposed else weight) if ctx.needs_input_grad[0] else None
        return d_x, d_weight, None, None


def _weight_gradient(left: Tensor, right: Tensor) -> Tensor:
    return multiply(left.flatten(0, -2).mT, right.flatten(0, -2))


def product(x: Tensor, weight: Tensor, later: Later | None = None, transposed: bool = False) -> Tensor:
    """x [..., k] times `weight`, [n, k], or [k, n] if `transposed` -> [..., n].

    `later`: the backward pass defers the gradient of `weight`, which must be a leaf, to it.
    """
    right = weight if transposed else weight.mT
    if later is not None or onednn.faster(x, right):
        return _Product.apply(x, weight, later, transposed)
    return x @ right
