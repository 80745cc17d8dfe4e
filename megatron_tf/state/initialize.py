"""Initial weights as a pure function of (seed, parameter name, row), so that they do not depend on the layout.

Rows are drawn in blocks, each from its own generator. So a shard draws only the blocks that it overlaps, and a tensor
with more rows begins with the rows of the smaller one.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_tf.state.parameters import ParameterSpec

BLOCK_ROWS = 256  # part of the definition: changing it changes every model's initial weights


def initial_rows(spec: ParameterSpec, seed: int, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the initial tensor, fp32 on the CPU, shape [stop - start, *spec.shape[1:]]."""
    if spec.std == 0:
        return torch.full((stop - start, *spec.shape[1:]), spec.mean)
    out = torch.empty(stop - start, *spec.shape[1:])
    for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
        first = block * BLOCK_ROWS
        drawn = torch.randn(BLOCK_ROWS, *spec.shape[1:], generator=_generator(seed, spec.name, block))
        low, high = max(start, first), min(stop, first + BLOCK_ROWS)
        out[low - start : high - start] = drawn[low - first : high - first]
    return out.mul_(spec.std).add_(spec.mean)


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
