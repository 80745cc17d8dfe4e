"""Random changes of weights by a growth, as a function of its seed and of their place."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from megatron_tf.architectures.spec import ParameterSpec
from megatron_tf.state.initialize import initial_rows


def noise(spec: ParameterSpec, seed: int, start: int, stop: int) -> Tensor:
    """N(0, 1) in fp64 for elements [start, stop) of a tensor, as a function of (seed of the growth, name, row)."""
    spec = replace(spec, name=f"{spec.name}/noise", std=1.0)
    first, last = start // spec.width, -(-stop // spec.width)
    rows = initial_rows(spec, seed, first, last).reshape(-1)
    return rows[start - first * spec.width : stop - first * spec.width].double()
