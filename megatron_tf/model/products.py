"""Matrix products. A Pattention takes one as an argument, because it can be computed in several types."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_tf.activations.function import ScoreFunction
from megatron_tf.model.kernels import native_grouped, onednn
from megatron_tf.model.kernels.operators import operator, register_fake
from megatron_tf.model.kernels.score_layout import empty_scores, is_aligned
from megatron_tf.native import is_amd

Gradient = Literal["left", "right"] | None
# A matrix, or what a product's `factor` has made of one. It has `mT`, and `split` along its last dim.
Factor = Any
# Rows of a product that are in memory a second time, where it has to be copied.
COPIED_ROWS = 1024
# Of a matrix of a stack. With fewer, packing its right factor takes longer than the product.
LEAST_ROWS_OF_STACKS = 32


class Product(Protocol):
    def __call__(self, left: Factor, right: Factor, gradient: Gradient = None, out: Tensor | None = None) -> Tensor:
        """left [m, k] times right [k, n] -> [m, n]. Written to `out` if that is given; its old content is ignored.

        `gradient`: which of the two factors is a gradient, if one is.
        """
        ...

    def scores(self, left: Factor, right: Factor, gradient: Gradient = None) -> Tensor:
        """The product, laid out as `score_layout.empty_scores`."""
        ...

    def factor(self, x: Tensor, *, gradient: bool = False, bound: float | None = None, both: bool = False) -> Factor:
        """x [m, n] prepared once: to be the left factor, or, if `both`, its transpose the left one of another product
        as well, or itself the right one.

        `gradient`: whether x is one.  `bound`: no element of x is larger, but perhaps by rounding, if that is known.
        """
        ...

    def weights(self, function: ScoreFunction, scores: Tensor, r: Tensor, scale: float) -> Factor:
        """S [m, n], as a left factor."""
        ...

    def rounds_scores(self, function: ScoreFunction, scores: Tensor) -> bool:
        """Whether `rounded_scores.to_scores` is for such scores."""
        ...


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left [..., k] times right [k, n] -> [..., n]. Not differentiable: for the passes of a `Function`."""
    return onednn.multiply(left, right) if onednn.faster(left, right) else left @ right


def add_product(left: Tensor, right: Tensor, total: Tensor | None) -> Tensor:
    """`multiply`, added to `total` [m, n] in its memory if there is one."""
    if total is None:
        return multiply(left, right)
    return total.add_(onednn.multiply(left, right)) if onednn.faster(left, right) else total.addmm_(left, right)


@operator(["out"])
def write_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """left [m, k] times right [k, n], written to `out` [m, n]. An operator because torch.compile would write a product
    into part of a matrix by making the product and copying the whole matrix."""
    if onednn.faster(left, right):
        for rows, part in zip(left.split(COPIED_ROWS), out.split(COPIED_ROWS)):
            part.copy_(onednn.multiply(rows, right))
    else:
        out.addmm_(left, right, beta=0)


register_fake("write_product", lambda left, right, out: None)


def add_products(
    total: Tensor,
    left: Tensor,
    right: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    symmetric: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """beta · total + alpha · left · right for each matrix of a stack [m, n, d], in the memory of `out`, or of `total`.

    left [m, n, k] and right [m, k, d] do not share that memory. With a beta of 0 the content of `total` is ignored.
    `symmetric`: whether the result is, and, with another beta, `total`. Not differentiable.
    """
    out = total if out is None else out
    # The native products divide a stack over threads, not a matrix. On Intel's processors nobody has timed them.
    enough = left.shape[1] >= LEAST_ROWS_OF_STACKS and 2 * len(left) >= torch.get_num_threads()
    whole = all(each.is_contiguous() for each in (out, total, left)) and (
        right.is_contiguous() or right.mT.is_contiguous()
    )
    if alpha and enough and whole and is_amd() and native_grouped.usable(right):
        native_grouped.add_products(total, left, right, out=out, alpha=alpha, beta=beta, symmetric=symmetric)
        return out
    return torch.baddbmm(total, left, right, beta=beta, alpha=alpha, out=out)


class PlainProduct:
    """A `Product` in the type of the factors."""

    def __call__(self, left: Factor, right: Factor, gradient: Gradient = None, out: Tensor | None = None) -> Tensor:
        if out is None:
            return multiply(left, right)
        write_product(left, right, out)
        return out

    def scores(self, left: Factor, right: Factor, gradient: Gradient = None) -> Tensor:
        if onednn.faster(left, right) and is_aligned(right.shape[1]):
            return onednn.multiply(left, right)
        return self(left, right, gradient, empty_scores(left, left.shape[0], right.shape[1]))

    def factor(self, x: Tensor, *, gradient: bool = False, bound: float | None = None, both: bool = False) -> Factor:
        return x

    def weights(self, function: ScoreFunction, scores: Tensor, r: Tensor, scale: float) -> Factor:
        return function.weights(scores, r, scale)

    def rounds_scores(self, function: ScoreFunction, scores: Tensor) -> bool:
        return False


PLAIN = PlainProduct()
