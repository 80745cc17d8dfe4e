"""The matrix product of a Pattention, as an argument, because it can be computed in several types."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

Gradient = Literal["left", "right"] | None


class Product(Protocol):
    def __call__(self, left: Tensor, right: Tensor, gradient: Gradient = None, out: Tensor | None = None) -> Tensor:
        """left [m, k] times right [k, n] -> [m, n]. Written to `out` if that is given; its old content is ignored.

        `gradient`: which of the two factors is a gradient, if one is.
        """
        ...


def plain_product(left: Tensor, right: Tensor, gradient: Gradient = None, out: Tensor | None = None) -> Tensor:
    """A `Product` in the type of the factors."""
    # With beta 0, addmm_ does not read `out`. (matmul's out= cannot be compiled here.)
    return left @ right if out is None else out.addmm_(left, right, beta=0)
