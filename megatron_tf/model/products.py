"""The products that a Pattention is made of, which can be made in several types."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

Gradient = Literal["left", "right"] | None


class Product(Protocol):
    def __call__(self, left: Tensor, right: Tensor, gradient: Gradient = None, out: Tensor | None = None) -> Tensor:
        """left [m, k] times right [k, n] -> [m, n], in `out` if it is given, whatever that held.

        `gradient`: which of the two is one.
        """
        ...


def plain_product(left: Tensor, right: Tensor, gradient: Gradient = None, out: Tensor | None = None) -> Tensor:
    """In the type of the factors."""
    # beta 0: what is in `out` is not read. torch.compile takes no out= here
    return left @ right if out is None else out.addmm_(left, right, beta=0)
