"""Perplexity, the usual form in which a language model's loss is reported."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss), at most 1e304, because JSON has no infinity."""
    return math.exp(min(loss, 700.0))


def format_perplexity(value: float) -> str:
    """A perplexity with two decimals, or, from a million on (as after a divergence), in powers of ten."""
    return f"{value:.2e}" if value >= 1e6 else f"{value:,.2f}"
