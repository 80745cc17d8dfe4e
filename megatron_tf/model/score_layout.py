"""Where scores lie: every row, and in it every projection's part, begins at a multiple of ALIGNMENT columns.

Tensor cores and loads of 16 bytes want that, and a number of tokens does not give it: 8,620 over 8 ranks are 1,077 or 1,078.
Between projections that share a product the gap is filled by keys of zeros, which add nothing to anything; behind a row's
end nothing is ever read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16


def empty_scores(like: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns] of the type and on the device of `like`, not initialised."""
    return like.new_empty_strided((rows, columns), (_aligned(columns), 1))


def joined(keys: Sequence[Tensor]) -> Tensor:
    """Keys [n_i, d] of projections that share a product, with zeros in the gaps: [columns, d]."""
    if len(keys) == 1:
        return keys[0]
    parts = [part for k in keys for part in (k, k.new_zeros(_aligned(k.shape[0]) - k.shape[0], k.shape[1]))]
    return torch.cat(parts[:-1])


def split(scores: Tensor, keys: Sequence[Tensor], dim: int = -1) -> tuple[Tensor, ...]:
    """Views of the projections' own parts of what has their `joined` columns along `dim`."""
    return _parts(scores, keys, dim)[::2]


def clear_gaps(scores: Tensor, keys: Sequence[Tensor]) -> None:
    """So that what nobody has written there does not come to count: 0 times NaN is NaN."""
    for gap in _parts(scores, keys, -1)[1::2]:
        if gap.shape[1]:
            gap.zero_()


def _parts(scores: Tensor, keys: Sequence[Tensor], dim: int) -> tuple[Tensor, ...]:
    """Projection, gap, projection, and so on."""
    sizes = [size for k in keys for size in (k.shape[0], _aligned(k.shape[0]) - k.shape[0])]
    return scores.split(sizes[:-1], dim)


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNMENT) * ALIGNMENT
