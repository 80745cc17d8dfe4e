"""Gradients of weights that are computed while the gradient of a layer's input travels between ranks.

The input of a sharded layer gets its gradient by an exchange: the backward pass of the function with which it enters
the layer. The gradients of the layer's weights do not depend on that exchange. So the layer leaves one product to it:

    forward   1. keys -> weights   2. x enters                3. layer(x, weights)
    backward  3. results -> keys   2. the exchange, and `do`  1. all but the product

Autograd runs the functions of a backward pass in the opposite order of their forward pass, as soon as they can run. So
`weights` are made before x enters. Should their turn come first all the same, the product is computed then: the
gradients are the same, and nothing is hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.parallel.groups import Group


class Meanwhile:
    """What one layer leaves to one exchange in one backward pass."""

    def __init__(self) -> None:
        self._work: Callable[[], Sequence[Tensor]] | None = None
        self._gradients: Sequence[Tensor] = ()

    def leave(self, work: Callable[[], Sequence[Tensor]]) -> None:
        """Called in the backward pass of the layer, which then gives its weights no gradients.

        `work`: computes one for each of them.
        """
        self._work = work

    def do(self) -> None:
        """Computes what has been left, if it has not been computed yet."""
        if self._work is not None:
            work, self._work = self._work, None
            self._gradients = work()

    def take(self) -> Sequence[Tensor]:
        """The gradients that were left, or none. Drops them here."""
        self.do()
        gradients, self._gradients = self._gradients, ()
        return gradients


def postponed(weights: Sequence[Tensor], group: Group) -> tuple[Sequence[Tensor], Meanwhile | None]:
    """(weights to be used in place of these, what their gradients may be left to).

    Without the latter where nothing can be hidden: on one process, in a compiled graph, whose collectives all wait, and
    where not all of the weights are trained.
    """
    trained = torch.is_grad_enabled() and all(weight.requires_grad for weight in weights)
    if group.size == 1 or not trained or torch.compiler.is_compiling():
        return weights, None
    # `Meanwhile` does not keep them: with what autograd keeps, that would be a circle, and memory be freed late
    own = Meanwhile()
    return _Weights.apply(own, *weights), own


class _Weights(Function):
    @staticmethod
    def forward(ctx, own, *weights):
        ctx.own, ctx.kinds = own, [(len(weight), weight.dtype) for weight in weights]
        ctx.set_materialize_grads(False)
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        left = ctx.own.take()
        if not left:
            return None, *grads
        # a layer may have padded its weights
        own = (left_one[:size].to(dtype) for left_one, (size, dtype) in zip(left, ctx.kinds))
        return None, *(other if grad is None else grad + other for grad, other in zip(grads, own))
