"""Two checkpoints side by side, tensor by tensor, through bounded buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_tf.checkpoint.reader import CheckpointReader

_CHUNK_ELEMENTS = 4 * 2**20


@dataclass(frozen=True)
class Difference:
    """How one state of one tensor differs.

    `shapes`: of the first and the second checkpoint, None where it is missing.  `compared`: leading elements
    that both have (a grown tensor has its old rows in front).  `unequal`: how many of them differ in bits.
    `largest`: the largest absolute difference among them; NaN when a NaN stands against another value.
    """

    name: str
    state: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    compared: int
    unequal: int
    largest: float

    @property
    def equal(self) -> bool:
        return self.shapes[0] == self.shapes[1] and self.unequal == 0


def compare(first: CheckpointReader, second: CheckpointReader) -> Iterator[Difference]:
    """One `Difference` for each tensor and state that either checkpoint has, equal ones included."""
    for name in {**first.index.tensors, **second.index.tensors}:
        for state in {**_states(first, name), **_states(second, name)}:
            shapes = (_shape(first, name, state), _shape(second, name, state))
            if shapes[0] is None or shapes[1] is None or shapes[0][1:] != shapes[1][1:]:
                yield Difference(name, state, shapes, 0, 0, 0.0)
                continue
            numel = min(math.prod(shapes[0]), math.prod(shapes[1]))
            yield Difference(name, state, shapes, numel, *_compare_range(first, second, name, state, numel))


def _compare_range(
    first: CheckpointReader, second: CheckpointReader, name: str, state: str, numel: int
) -> tuple[int, float]:
    """(unequal elements, largest absolute difference) of the leading `numel` elements."""
    unequal, largest = 0, 0.0
    for start in range(0, numel, _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, numel)
        one, other = first.read(name, state, start, stop), second.read(name, state, start, stop)
        differs = one.view(torch.int32) != other.view(torch.int32)
        if count := int(differs.sum()):
            unequal += count
            distance = float((one[differs].double() - other[differs].double()).abs().max())
            largest = math.nan if math.isnan(distance) else max(largest, distance)
    return unequal, largest


def _states(reader: CheckpointReader, name: str) -> Mapping[str, object]:
    tensor = reader.index.tensors.get(name)
    return tensor.states if tensor is not None else {}


def _shape(reader: CheckpointReader, name: str, state: str) -> tuple[int, ...] | None:
    tensor = reader.index.tensors.get(name)
    return tensor.shape if tensor is not None and state in tensor.states else None
