"""Two checkpoints side by side, tensor by tensor, through bounded buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_tf.checkpoint.format import CheckpointIndex
from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.state.parameters import in_layer, layer_of

_CHUNK_ELEMENTS = 4 * 2**20


@dataclass(frozen=True)
class StateDifference:
    """The difference of one state of one tensor.

    `shapes`: of the first and the second checkpoint, None where it is missing.  `compared`: the number of leading
    elements that both have (a grown tensor has its old rows in front).  `unequal`: how many of them differ.
    `largest`: the largest absolute difference among them; NaN when a NaN is compared with another value.
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


def compare(first: CheckpointReader, second: CheckpointReader) -> Iterator[StateDifference]:
    """One `StateDifference` for each tensor and state that either checkpoint has, equal ones included.

    When one is grown from the other in depth, its old layers are compared with the layers that they were. A difference
    has the name in the second checkpoint, if it has the tensor.
    """
    for names in _pairs(first.index, second.index):
        name = names[1] or names[0]
        for state in {**_states(first, names[0]), **_states(second, names[1])}:
            shapes = (_shape(first, names[0], state), _shape(second, names[1], state))
            if shapes[0] is None or shapes[1] is None or shapes[0][1:] != shapes[1][1:]:
                yield StateDifference(name, state, shapes, 0, 0, 0.0)
                continue
            numel = min(math.prod(shapes[0]), math.prod(shapes[1]))
            yield StateDifference(name, state, shapes, numel, *_compare_range(first, second, names, state, numel))


def _compare_range(
    first: CheckpointReader, second: CheckpointReader, names: tuple[str, str], state: str, numel: int
) -> tuple[int, float]:
    """(unequal elements, largest absolute difference) of the leading `numel` elements."""
    unequal, largest = 0, 0.0
    for start in range(0, numel, _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, numel)
        one, other = first.read(names[0], state, start, stop), second.read(names[1], state, start, stop)
        differs = one.view(torch.int32) != other.view(torch.int32)
        if count := int(differs.sum()):
            unequal += count
            distance = float((one[differs].double() - other[differs].double()).abs().max())
            largest = math.nan if math.isnan(distance) else max(largest, distance)
    return unequal, largest


def _pairs(first: CheckpointIndex, second: CheckpointIndex) -> Iterator[tuple[str, str]]:
    """(Name in the first, name in the second) of each tensor, also if a growth has moved it; "" where it is missing."""
    moved = _moved(first, second)
    back = {old: new for new, old in _moved(second, first).items()}
    counterparts = {name: moved.get(name, back.get(name, "" if back else name)) for name in first.tensors}
    for name, other in counterparts.items():
        yield name, other if other in second.tensors else ""
    found = set(counterparts.values())
    yield from (("", name) for name in second.tensors if name not in found)


def _moved(smaller: CheckpointIndex, grown: CheckpointIndex) -> dict[str, str]:
    """Tensors of the smaller model -> their names in the one that was grown from it in depth; empty for all others."""
    layers = (grown.growth_history[-1].get("layers") if grown.growth_history else None) or {}
    counts, old_at = [index.model.get("num_layers") for index in (smaller, grown)], layers.get("old_at", ())
    if counts != [len(old_at), layers.get("to")]:
        return {}
    moved = {name: name for name in smaller.tensors}
    for name in smaller.tensors:
        layer = layer_of(name)
        if layer is not None and layer < len(old_at):
            moved[name] = in_layer(name, old_at[layer])
    return moved


def _states(reader: CheckpointReader, name: str) -> Mapping[str, object]:
    tensor = reader.index.tensors.get(name)
    return tensor.states if tensor is not None else {}


def _shape(reader: CheckpointReader, name: str, state: str) -> tuple[int, ...] | None:
    tensor = reader.index.tensors.get(name)
    return tensor.shape if tensor is not None and state in tensor.states else None
