"""Stochastic depth: in training each sample skips some residual branches, and the others are scaled up to compensate.

The choice is a function of seed, step, place of the sample in its step, layer and branch. So it is the same at every
layout, and in the recomputation of a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_tf.data.samples import derived_seed, mixed

BRANCHES = 2  # of a block: attention and feed-forward


class DropPath:
    """Layer l of L skips each branch with probability rate · l / (L − 1), which is 0 in the first layer."""

    def __init__(self, rate: float, num_layers: int, seed: int):
        self._skipped = rate * np.arange(num_layers) / max(1, num_layers - 1)
        self._seed = seed

    def scales(self, step: int, places: Sequence[int]) -> Tensor:
        """The factors of the samples' branches, fp32 [layers, branches, b]: 0, or 1 / (1 − the layer's probability).

        `places`: of the b samples in the (0-based) `step`, counted from 0.
        """
        layers, branches = np.arange(len(self._skipped), dtype=np.uint64), np.arange(BRANCHES, dtype=np.uint64)
        chosen = np.array(places, np.uint64)
        number = (chosen * layers.size + layers[:, None, None]) * BRANCHES + branches[:, None]
        key = np.uint64(derived_seed(self._seed, step))
        uniform = (mixed(mixed(number) ^ key) >> np.uint64(11)) / 2.0**53
        rates = self._skipped[:, None, None]
        kept = (uniform >= rates) / (1 - rates)
        return torch.from_numpy(kept.astype(np.float32))
