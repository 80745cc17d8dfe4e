"""Whether two implementations compute the same logits from the same weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Relative to the largest logit. Two orders of summation in fp32 differ by 1e-6 of it, and half precision by 1e-2; other
# heads, another rotary embedding or another activation differ by a third and more.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Agreement:
    """`error`: largest difference of any logit.  `largest`: largest logit of the reference, without its sign."""

    error: float
    largest: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance * self.largest

    def __str__(self) -> str:
        return f"logits differ by {self.error:.2g} at most; the largest is {self.largest:.3g}"


def agreement(found: Tensor, expected: Tensor) -> Agreement:
    """The agreement of logits with a reference of the same shape. The type of the reference decides the tolerance."""
    return Agreement(
        error=(found.double() - expected.double()).abs().max().item(),
        largest=expected.abs().max().item(),
        tolerance=TOLERANCES[expected.dtype],
    )
