"""The rank grid as arithmetic. No process group, no torch: testable for any world size.

Ranks are ordered (pipeline, data, tensor), tensor innermost so that tensor-parallel ranks are neighbours
on a node. This is also the order of DeepSpeed's PipeModelDataParallelTopology.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GridAxis = Literal["pipeline", "data", "tensor"]


@dataclass(frozen=True)
class Topology:
    """Sizes of the three axes; world size is their product."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.data

    def coordinate(self, axis: GridAxis, rank: int) -> int:
        """Position of `rank` along `axis`."""
        assert 0 <= rank < self.world_size
        stride, size = self.stride(axis), getattr(self, axis)
        return rank // stride % size

    def peers(self, axis: GridAxis, rank: int) -> list[int]:
        """The ranks that differ from `rank` along `axis` only, in order; `rank` itself is among them."""
        stride, size = self.stride(axis), getattr(self, axis)
        first = rank - self.coordinate(axis, rank) * stride
        return [first + i * stride for i in range(size)]

    def groups(self, axis: GridAxis) -> list[list[int]]:
        """Every group along `axis`; together they hold each rank once."""
        return [self.peers(axis, rank) for rank in range(self.world_size) if self.coordinate(axis, rank) == 0]

    def stride(self, axis: GridAxis) -> int:
        """How far apart neighbours along `axis` are in the order of ranks."""
        return {"tensor": 1, "data": self.tensor, "pipeline": self.tensor * self.data}[axis]

    def __str__(self) -> str:
        return f"TP{self.tensor}×PP{self.pipeline}×DP{self.data}"


def stage_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """Layers that pipeline stage `stage` of `num_stages` holds: contiguous, sizes that differ by at most one.

    Earlier stages take the larger share, because the last one also computes the output head.
    """
    assert 0 <= stage < num_stages <= num_layers
    first, stop = (-(-num_layers * bound // num_stages) for bound in (stage, stage + 1))
    return range(first, stop)
