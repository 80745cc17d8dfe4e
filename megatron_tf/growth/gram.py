"""New key tokens with a given Gram matrix: R with RᵀR = factor · KᵀK. Any range of it has the same bits everywhere.

    R = Q C,   CᵀC = factor · KᵀK,   QᵀQ = 1

| tensor | shape | meaning |
|---|---|---|
| K | [n_old, d] | old key tokens, read once in blocks of rows |
| C | [p, d], p = min(n_old, d) | √factor · K itself if n_old ≤ d, else √factor · (KᵀK)^½ |
| Q | [m, p] | m new tokens; p columns of the m × m cosine transform, with random signs of its rows and columns |
| R | [m, d] | new key tokens |

Q's entries have a closed form, so a block of rows costs one small product and nothing of the size of R is ever held;
its rows have all about the same norm and no two of them are parallel, so each new token is a direction of its own.

All is computed in fp64, on one thread, and in the same fixed blocks of rows for any range, because the order of sums in
a matrix product depends on its shape and on the number of threads. (KᵀK)^½ is the symmetric root, which is unique:
factors that depend on the signs of eigenvectors could differ between two machines of one run.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from megatron_tf.errors import CheckpointError
from megatron_tf.growth.sizes import check_finite, one_thread

BLOCK_ROWS = 256  # of R; part of the definition, because it affects rounding
_READ_ROWS = 4096  # of K, likewise


class GramKeys:
    """The new keys of one projection.

    `old_keys`: elements [start, stop) of the flattened K.  `factor` > 0.  `seed`, `name`: they determine Q.
    Holds C (fp64, 8·p·d bytes) and one block of R from the first `read` on.
    """

    def __init__(
        self,
        old_keys: Callable[[int, int], Tensor],
        *,
        old_tokens: int,
        added_tokens: int,
        width: int,
        factor: float,
        seed: int,
        name: str,
    ):
        assert factor > 0 and added_tokens >= min(old_tokens, width)
        self._old_keys = old_keys
        self._old_tokens = old_tokens
        self._added = added_tokens
        self._width = width
        self._factor = factor
        self._seed = seed
        self._name = name
        self._latest: tuple[int, Tensor] | None = None  # kept, because successive ranges often share a block

    def read(self, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened grown tensor, all of them new ones: flat fp64."""
        width, first_row = self._width, self._old_tokens
        start, stop = start - first_row * width, stop - first_row * width
        assert 0 <= start <= stop <= self._added * width
        out = torch.empty(stop - start, dtype=torch.float64)
        size = BLOCK_ROWS * width
        for block in range(start // size, -(-stop // size)):
            low, high = max(start, block * size), min(stop, (block + 1) * size)
            out[low - start : high - start] = self._block(block)[low - block * size : high - block * size]
        return out

    def _block(self, block: int) -> Tensor:
        """R's rows from block · BLOCK_ROWS on, flat."""
        if self._latest is None or self._latest[0] != block:
            rows = torch.arange(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self._added))
            with one_thread():
                self._latest = block, (self._mixing(rows) @ self._root).reshape(-1)
        return self._latest[1]

    def _mixing(self, rows: Tensor) -> Tensor:
        """These rows of Q: entry (r, j) is ± c_j cos(π (2r + 1) f_j / 2m), with c = √(1/m) for f = 0, else √(2/m)."""
        frequencies, row_signs, column_signs, cosines = self._draw
        m = self._added
        # The angle modulo a full turn, in integers: exact, however large the product is.
        entries = cosines[(2 * rows + 1).outer(frequencies) % (4 * m)]
        norms = torch.full((len(frequencies),), math.sqrt(2 / m), dtype=torch.float64)
        norms[0] = math.sqrt(1 / m)
        return entries * (norms * column_signs) * row_signs[rows, None]

    @cached_property
    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frequencies [p] and signs of Q's columns, signs of its rows, and the cosines of all angles there are."""
        digest = hashlib.sha256(f"{self._seed}/{self._name}/gram".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        m, p = self._added, min(self._old_tokens, self._width)
        others = torch.randperm(m - 1, generator=generator)[: p - 1] + 1
        # The constant column is always included, so that no row is all zero: with value 0 its token would be dead.
        frequencies = torch.cat([torch.zeros(1, dtype=torch.int64), others])
        rows, columns = (torch.randint(0, 2, (count,), generator=generator).double() * 2 - 1 for count in (m, p))
        cosines = torch.cos(torch.arange(4 * m, dtype=torch.float64) * (math.pi / (2 * m)))
        return frequencies, rows, columns, cosines

    @cached_property
    def _root(self) -> Tensor:
        """C. CheckpointError when all old keys are 0, because the new tokens would be dead like their projection, or
        when keys are not finite."""
        n, d = self._old_tokens, self._width
        if n <= d:
            root = self._rows(0, n)
        else:
            matrix = torch.zeros(d, d, dtype=torch.float64)
            for first in range(0, n, _READ_ROWS):
                rows = self._rows(first, min(first + _READ_ROWS, n))
                matrix += rows.T @ rows
            values, vectors = torch.linalg.eigh(matrix)
            root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        if not root.any():
            raise CheckpointError(
                f"{self._name}.key_tokens: all old keys are 0, so gram's new tokens would have key 0 and value 0 and "
                "never learn anything. Set growth.method to zero_key."
            )
        return root * math.sqrt(self._factor)

    def _rows(self, first: int, last: int) -> Tensor:
        flat = self._old_keys(first * self._width, last * self._width)
        check_finite(flat, f"{self._name}.key_tokens")
        return flat.to(torch.float64).view(last - first, self._width)
