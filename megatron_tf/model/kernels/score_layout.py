"""Memory layout of the scores: rows, and each projection's columns within a row, start at multiples of ALIGNMENT.

Tensor cores and loads of 16 bytes need that, and numbers of tokens are arbitrary: 8,620 over 8 ranks are 1,077 or
1,078. Between projections that share a product the gap is filled by keys of zeros, which add nothing to any result.

The columns after a row's end are zeros. No pass over scores reads them, but matrix products do: the bf16 product of
CPUs takes columns in pairs, and with an odd number of them multiplies the next column by 0. 0 · NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.model.kernels.operators import operator, register_fake

ALIGNMENT = 16
# Devices whose matrix products are slow unless every size, not only every row's start, is a multiple of 16 bytes. On an
# H200, cuBLAS used kernels of two generations ago for 8,620 tokens, at half the speed.
ALIGNED_SIZES = ("cuda",)


def empty_scores(like: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] of the type and on the device of `like`, uninitialised, with zeros after each row's end."""
    whole = like.new_empty(rows, _aligned(columns))
    if whole.shape[1] == columns:
        return whole
    clear(whole[:, columns:])
    return whole[:, :columns]


@operator(["columns"])
def clear(columns: Tensor) -> None:
    """Zeros. An operator because torch.compile would make a copy of the matrix that the columns are part of."""
    columns.zero_()


register_fake("clear", lambda columns: None)


def filled(tokens: Tensor) -> Tensor:
    """Tokens [n, d]; on devices of ALIGNED_SIZES, padded with rows of zeros to a multiple of ALIGNMENT.

    Zero keys and values change nothing with an activation that ignores scores of 0.
    """
    missing = _aligned(tokens.shape[0]) - tokens.shape[0]
    if missing == 0 or tokens.device.type not in ALIGNED_SIZES:
        return tokens
    return F.pad(tokens, (0, 0, 0, missing))


def concatenated(keys: Sequence[Tensor]) -> Tensor:
    """Keys [n_i, d] of projections that share a product, with zeros in the gaps: [columns, d]."""
    if len(keys) == 1:
        return keys[0]
    parts = [part for k in keys for part in (k, k.new_zeros(_aligned(k.shape[0]) - k.shape[0], k.shape[1]))]
    return torch.cat(parts[:-1])


def split(scores: Tensor, keys: Sequence[Tensor], dim: int = -1) -> tuple[Tensor, ...]:
    """Views of each projection's part of `scores`, which has their `concatenated` columns along `dim`."""
    return _parts(scores, keys, dim)[::2]


def clear_gaps(scores: Tensor, keys: Sequence[Tensor]) -> None:
    """Zero the columns between projections. They are uninitialised, and 0 · NaN would put NaN into dX."""
    for gap in _parts(scores, keys, -1)[1::2]:
        if gap.shape[1]:
            clear(gap)


def _parts(scores: Tensor, keys: Sequence[Tensor], dim: int) -> tuple[Tensor, ...]:
    """Views of the columns of a projection, the gap after it, the next projection, and so on."""
    sizes = [size for k in keys for size in (k.shape[0], _aligned(k.shape[0]) - k.shape[0])]
    return scores.split(sizes[:-1], dim)


def is_aligned(columns: int) -> bool:
    """Whether `empty_scores` of so many columns has nothing after a row's end."""
    return _aligned(columns) == columns


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNMENT) * ALIGNMENT
