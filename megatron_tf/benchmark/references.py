"""References for measurements of Pattention: the plain formula, an MLP, and the products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.model.linear import linear
from megatron_tf.model.products import multiply

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [s, b, d_in], keys [n, d_in], values [n, d_out] -> [s, b, d_out]


def plain_formula(x: Tensor, keys: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
    """`l2_norm_gelu` in eager torch, with the steps of the official code; autograd derives the backward pass.

    Like that code it makes and multiplies by a mask of ones at every call, and each step makes a tensor [s, b, n].
    """
    mask = torch.ones(x.shape[-2], keys.shape[0], dtype=x.dtype, device=x.device)
    scores = x @ keys.mT
    scores = scores * mask
    normalised = scores / torch.norm(scores, p=2, dim=-1, keepdim=True)
    normalised = normalised * (keys.shape[0] ** 0.5 if scale is None else scale)
    return F.gelu(normalised) @ values


FORMULAS = {"l2_norm_gelu": plain_formula}  # by activation


def gelu_mlp(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same two products with a GELU between them and no normalisation."""
    return linear(F.gelu(linear(x, keys)), values, transposed=True)


def bare_layer(x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The same two products with nothing between them."""
    return linear(linear(x, keys), values, transposed=True)


@torch.no_grad()
def bare_products(x: Tensor, keys: Tensor, values: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The six products of forward and backward (grad: of the output), with nothing between them: the floor."""
    x, grad = x.flatten(0, -2), grad.flatten(0, -2)
    scores = multiply(x, keys.mT)
    out = multiply(scores, values)
    d_scores = multiply(grad, values.mT)
    return out, multiply(scores.mT, grad), multiply(d_scores, keys), multiply(d_scores.mT, x)
