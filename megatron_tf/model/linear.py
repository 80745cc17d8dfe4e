"""A product with a weight, by the fastest product of matrices, and with a gradient that can be deferred."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.model.kernels import onednn
from megatron_tf.model.later import Later
from megatron_tf.model.products import multiply


class _Linear(Function):
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


def linear(x: Tensor, weight: Tensor, later: Later | None = None, transposed: bool = False) -> Tensor:
    """x [..., k] times `weight`, [n, k], or [k, n] if `transposed` -> [..., n]. Differentiable.

    `later`: the backward pass defers the gradient of `weight`, which must be a leaf, to it.
    """
    right = weight if transposed else weight.mT
    if later is not None or onednn.faster(x, right):
        return _Linear.apply(x, weight, later, transposed)
    return x @ right
