"""The rank grid as arithmetic. No process group, no torch: testable for any world size.

Ranks are ordered (pipeline, data, context, tensor), tensor innermost so that tensor-parallel ranks are neighbours
on a node. Without a context axis this is also the order of DeepSpeed's PipeModelDataParallelTopology.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# "replicas" is data and context together: the ranks that hold the same part of the model
GridAxis = Literal["pipeline", "data", "context", "tensor", "replicas"]


@dataclass(frozen=True)
class Topology:
    """Sizes of the four axes; world size is their product.

    `virtual_stages`: parts of the depth per pipeline rank; the parts are dealt out to the ranks in turn.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    virtual_stages: int = 1

    def parts(self, num_layers: int, stage: int) -> list[range]:
        """The layers of pipeline rank `stage`, part by part in the order of the depth."""
        stages = self.pipeline * self.virtual_stages
        return [stage_layers(num_layers, stages, number) for number in range(stage, stages, self.pipeline)]

    def num_layers(self, num_layers: int, stage: int) -> int:
        """How many of the model's `num_layers` layers pipeline rank `stage` holds."""
        return sum(map(len, self.parts(num_layers, stage)))

    @property
    def replicas(self) -> int:
        """Ranks that hold the same part of the model, each for samples or positions of its own."""
        return self.data * self.context

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.replicas

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
        """Difference between the ranks of two neighbours along `axis`."""
        strides = {
            "tensor": 1,
            "context": self.tensor,
            "replicas": self.tensor,
            "data": self.tensor * self.context,
            "pipeline": self.tensor * self.replicas,
        }
        return strides[axis]

    def __str__(self) -> str:
        context = f"×CP{self.context}" if self.context > 1 else ""
        virtual = f"v{self.virtual_stages}" if self.virtual_stages > 1 else ""
        return f"TP{self.tensor}×PP{self.pipeline}{virtual}×DP{self.data}{context}"


def stage_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """Layers that pipeline stage `stage` of `num_stages` holds: contiguous, sizes that differ by at most one.

    Earlier stages take the larger share, because the last one also computes the output head.
    """
    assert 0 <= stage < num_stages <= num_layers
    first, stop = (-(-num_layers * bound // num_stages) for bound in (stage, stage + 1))
    return range(first, stop)
