"""Causal self-attention over the heads that this rank holds, with partial rotary position embedding.

Hidden states are [s, b, d]: sequence first, so that a split over the sequence is contiguous.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


@lru_cache(maxsize=8)
def rotary_tables(seq_length: int, channels: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 whatever the model's type, [s, 1, 1, channels].

    Channel j is paired with j + channels/2; angle = position · base^(−2j/channels). Not a buffer of the model,
    because a conversion of the model to bf16 would round the angles too.
    """
    exponent = torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels
    positions = torch.arange(seq_length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / base**exponent)
    angles = torch.cat((angles, angles), -1)[:, None, None, :]
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first channels of every head; x [s, b, heads, head_dim], tables [s, 1, 1, channels]."""
    channels = cos.shape[-1]
    turned, kept = x[..., :channels], x[..., channels:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned.to(x.dtype), kept), -1)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, head_dim: int, channels: int, base: float) -> Tensor:
    """query, key, value [s, b, heads·head_dim] -> the same shape. Scale 1/√head_dim.

    `channels` of each head are rotated (0 is none).
    """
    query, key, value = (t.unflatten(-1, (-1, head_dim)) for t in (query, key, value))
    if channels:
        cos, sin = rotary_tables(query.shape[0], channels, base, query.device)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
    query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return out.permute(2, 0, 1, 3).flatten(-2)
