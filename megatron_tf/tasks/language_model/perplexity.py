"""Perplexity, the usual way to say what a language model's loss is."""

from __future__ import annotations

import math


def perplexity(loss: float) -> float:
    """exp(loss), at most 1e304: JSON has no infinity."""
    return math.exp(min(loss, 700.0))


def format_perplexity(value: float) -> str:
    """With two decimals; one of a million or more, as after a divergence, in powers of ten."""
    return f"{value:.2e}" if value >= 1e6 else f"{value:,.2f}"
