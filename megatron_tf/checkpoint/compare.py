"""Two checkpoints side by side, tensor by tensor, through bounded buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from megatron_tf.checkpoint.format import CheckpointIndex
from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.state.parameters import in_layer, layer_of

_CHUNK_ELEMENTS = 4 * 2**20


@dataclass(frozen=True)
class StateDifference:
    """The difference of one state of one tensor.

    `shapes`: of the first and the second checkpoint, None where it is missing.  `compared`: the number of leading
    elements that both have (a grown tensor has its old rows in front); 0 where they cannot be compared.  `unequal`: how
    many of them differ.  `largest`: the largest absolute difference among them; NaN when a NaN is compared with another
    value.
    """

    name: str
    state: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    compared: int
    unequal: int
    largest: float

    @property
    def equal(self) -> bool:
        return self.shapes[0] == self.shapes[1] and self.unequal == 0 and self.compared > 0


class Stretches(Protocol):
    """Where the elements of a tensor of copies are in the tensor that they are copied from."""

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, start there) for each part of elements [start, stop) that is one range there."""
        ...


@dataclass(frozen=True)
class Split:
    """`copies`: (original, where its elements are) of each tensor of copies, by name.

    `in_second`: whether the second checkpoint holds the copies, and not the first.
    `apart`: tensors of which both have one, but no element of the one is what an element of the other is.
    """

    copies: Mapping[str, tuple[str, Stretches]] = field(default_factory=dict)
    in_second: bool = True
    apart: Collection[str] = frozenset()


def compare(first: CheckpointReader, second: CheckpointReader, split: Split = Split()) -> Iterator[StateDifference]:
    """One `StateDifference` for each tensor and state that either checkpoint has, equal ones included.

    When one is grown from the other in depth, its old layers are compared with the layers that they were; when one is
    `split` from the other, each copy with its original. A difference has the name of the copies, or else the name
    in the second checkpoint, if it has the tensor.
    """
    for names, where in _pairs(first.index, second.index, split):
        name = names[1] or names[0] if where is None else names[split.in_second]
        for state in {**_states(first, names[0]), **_states(second, names[1])}:
            shapes = (_shape(first, names[0], state), _shape(second, names[1], state))
            if shapes[0] is None or shapes[1] is None or shapes[0][1:] != shapes[1][1:] or name in split.apart:
                yield StateDifference(name, state, shapes, 0, 0, 0.0)
                continue
            sizes = math.prod(shapes[0]), math.prod(shapes[1])
            numel = min(sizes) if where is None else sizes[split.in_second]
            reads = [partial(first.read, names[0], state), partial(second.read, names[1], state)]
            if where is not None:
                old = not split.in_second
                reads[old] = partial(_read_originals, reads[old], where)
            yield StateDifference(name, state, shapes, numel, *_compare_range(reads[0], reads[1], numel))


_Read = Callable[[int, int], Tensor]


def _read_originals(read: _Read, where: Stretches, start: int, stop: int) -> Tensor:
    """The elements that [start, stop) of the copies are copies of."""
    return torch.cat([read(first, first + high - low) for low, high, first in where.stretches(start, stop)])


def _compare_range(first: _Read, second: _Read, numel: int) -> tuple[int, float]:
    """(unequal elements, largest absolute difference) of the leading `numel` elements."""
    unequal, largest = 0, 0.0
    for start in range(0, numel, _CHUNK_ELEMENTS):
        stop = min(start + _CHUNK_ELEMENTS, numel)
        one, other = first(start, stop), second(start, stop)
        differs = one.view(torch.int32) != other.view(torch.int32)
        if count := int(differs.sum()):
            unequal += count
            distance = float((one[differs].double() - other[differs].double()).abs().max())
            largest = math.nan if math.isnan(distance) else max(largest, distance)
    return unequal, largest


def _pairs(
    first: CheckpointIndex, second: CheckpointIndex, split: Split
) -> Iterator[tuple[tuple[str, str], Stretches | None]]:
    """((name in the first, name in the second), where copies have their originals) of each tensor, also if a growth has
    moved or copied it. "" where it is missing, None where nothing is copied."""
    moved = _moved(first, second)
    back = {old: new for new, old in _moved(second, first).items()}
    counterparts = {name: moved.get(name, back.get(name, "" if back else name)) for name in first.tensors}
    found = set(counterparts.values())
    pairs = [(name, other if other in second.tensors else "") for name, other in counterparts.items()]
    pairs += [("", name) for name in second.tensors if name not in found]
    originals = {original for original, _ in split.copies.values()}
    for pair in pairs:
        here, there = pair[split.in_second], pair[not split.in_second]
        if here in split.copies:
            original, where = split.copies[here]
            yield ((original, here) if split.in_second else (here, original)), where
        elif here or there not in originals:
            yield pair, None


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
