"""Self-attention, causal or not, over the heads that this rank holds, with partial rotary position embedding.

Hidden states are [s, b, d]: sequence first, so that a split over the sequence is contiguous.

With `Documents`, a sample contains several documents one after another. Query i then sees the keys first(i) ≤ j ≤ i,
where first(i) is the first position of its document, and its rotary position is i − first(i). So each document has the
same result as alone. On GPUs flex_attention skips blocks of scores between documents; elsewhere they are computed and
masked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


class Documents(NamedTuple):
    """The documents of a micro batch; the same for all layers."""

    starts: Tensor  # int32 [b, s]: position in the sample of the first token of each token's document
    mask: Tensor | BlockMask  # [b, 1, s, s]: 0 where a query (row) sees a key, −inf elsewhere


def document_starts(ids: Tensor, ends: Sequence[int]) -> Tensor | None:
    """`Documents.starts` of ids [b, s]. A token in `ends` is the last of its document; without `ends` None: each sample
    is one document."""
    if not ends:
        return None
    is_end = torch.zeros_like(ids, dtype=torch.bool)
    for end in ends:
        is_end |= ids == end
    positions = torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device)
    begins = F.pad(is_end[:, :-1], (1, 0))
    return torch.where(begins, positions, 0).cummax(1).values


def find_documents(starts: Tensor, dtype: torch.dtype, head_dim: int) -> Documents:
    """The documents with these `starts`, for attention in `dtype`. To be made once a micro batch, for all layers."""
    # On GPUs the kernel of flex_attention multiplies tiles of 16, and has no fp64.
    if starts.is_cuda and head_dim >= 16 and dtype != torch.float64:
        return Documents(starts, block_mask(starts))
    return Documents(starts, dense_mask(starts, dtype))


def dense_mask(starts: Tensor, dtype: torch.dtype) -> Tensor:
    """`Documents.mask` as a tensor."""
    positions = torch.arange(starts.shape[1], device=starts.device)
    seen = (starts[:, :, None] <= positions) & (positions <= positions[:, None])
    return torch.zeros(seen.shape, dtype=dtype, device=starts.device).masked_fill_(~seen, -torch.inf)[:, None]


def block_mask(starts: Tensor) -> BlockMask:
    """`Documents.mask` for flex_attention, which skips blocks that no query sees."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (starts[batch, query] <= key) & (key <= query)

    length = starts.shape[1]
    return create_block_mask(seen, starts.shape[0], None, length, length, device=starts.device)


@lru_cache(maxsize=8)
def rotary_tables(seq_length: int, channels: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 for any type of the model, [s, 1, 1, channels].

    Channel j is paired with j + channels/2; angle = position · base^(−2j/channels). They are not buffers of the model,
    because a conversion of the model to bf16 would round the angles as well.
    """
    exponent = torch.arange(0, channels, 2, device=device, dtype=torch.float32) / channels
    positions = torch.arange(seq_length, device=device, dtype=torch.float32)
    angles = torch.outer(positions, 1.0 / base**exponent)
    angles = torch.cat((angles, angles), -1)[:, None, None, :]
    return angles.cos(), angles.sin()


class _Rotate(Function):
    """A rotation by position; the gradient is rotated back. Copies x once and overwrites the rotated channels."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x[..., : cos.shape[-1]].chunk(2, -1)
    cos, sin = cos[..., : first.shape[-1]], sin[..., : first.shape[-1]]
    out = x.clone(memory_format=torch.contiguous_format)
    turned, other = out[..., : 2 * cos.shape[-1]].chunk(2, -1)
    turned.copy_(first * cos - second * sin)
    other.copy_(second * cos + first * sin)
    return out


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x with the first channels of every head rotated; x [s, b, heads, head_dim], tables [s, b or 1, 1, channels]."""
    return _Rotate.apply(x, cos, sin)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, channels: int, base: float, documents: Documents | None = None
) -> Tensor:
    """query [s, b, heads, head_dim], key and value [s, b, g, head_dim] -> [s, b, heads·head_dim]. Scale 1/√head_dim.

    g divides heads: query heads i·heads/g to (i + 1)·heads/g − 1 see the i-th key and value (grouped-query attention).
    `channels`: of each head, rotated; 0: none.  `base`: of the rotary angles.  `documents`: None: each sample is one.
    """
    query, key, value = _by_head(query, key, value, channels, base, documents)
    if documents is None:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    elif isinstance(documents.mask, Tensor):
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=documents.mask)
    else:
        out = _fused_flex_attention()(query, key, value, block_mask=documents.mask)
    return out.permute(2, 0, 1, 3).flatten(-2)


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, channels: int, base: float, documents: Documents | None = None
) -> Tensor:
    """As `causal_attention`, but every position sees all positions. Each sample must be one document."""
    assert documents is None
    query, key, value = _by_head(query, key, value, channels, base)
    return F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3).flatten(-2)


def _by_head(
    query: Tensor, key: Tensor, value: Tensor, channels: int, base: float, documents: Documents | None = None
) -> tuple[Tensor, ...]:
    """Query, key and value, the first two rotated, [b, heads, s, head_dim] each: key and value once a query head."""
    if channels:
        # torch.compile would trace through the cache with a warning, and training cannot use tables that were made in
        # inference mode. Both get the function itself.
        uncached = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
        tables = rotary_tables.__wrapped__ if uncached else rotary_tables
        cos, sin = tables(query.shape[0], channels, base, query.device)
        if documents is not None:
            starts = documents.starts.mT
            positions = torch.arange(starts.shape[0], device=starts.device)[:, None] - starts
            cos, sin = cos[positions, 0], sin[positions, 0]
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
    key, value = (shared_heads(t, query.shape[2]) for t in (key, value))
    return tuple(t.permute(1, 2, 0, 3) for t in (query, key, value))


def shared_heads(t: Tensor, heads: int) -> Tensor:
    """[s, b, g, head_dim] -> [s, b, heads, head_dim]: repeats each of the g heads heads/g times."""
    return t if t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], 2)


@lru_cache(maxsize=1)
def _fused_flex_attention() -> Callable[..., Tensor]:
    """flex_attention, compiled on first use. Uncompiled, it would compute and keep every score."""
    return torch.compile(flex_attention, dynamic=False)
