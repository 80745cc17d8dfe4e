"""The state of a deeper model, computed while it is read. `growth.layers` defines the origin of each layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from megatron_tf.architectures.spec import ParameterSpec
from megatron_tf.growth.layers import Origins
from megatron_tf.state.optimizer_states import WEIGHT, initial_value
from megatron_tf.state.parameters import in_layer, layer_of
from megatron_tf.state.ranges import StepRange
from megatron_tf.state.sources import StateSource, read_whole


class DeeperSource:
    """State of a model with more layers, made of `old` by `origins`, with new values from `fresh`.

    `table`: parameters of the deeper model.  `scales`: its τ.
    A `StateSource`. It only renames tensors, so it holds no state.
    """

    def __init__(
        self,
        old: StateSource,
        fresh: StateSource,
        table: Mapping[str, ParameterSpec],
        origins: Origins,
        scales: Mapping[str, float],
    ):
        self._old = old
        self._fresh = fresh
        self._table = table
        self._origins = origins
        self._old_at = frozenset(origins.old_at)
        self.scales = scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        return read_whole(self, name, state, start, stop)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        taken = self._taken(name)
        if state == WEIGHT and taken is None and self._table[name].output:
            target.zero_()
        elif taken is None:
            self._fresh.read_into(name, state, start, target)
        elif state == WEIGHT or self._is_old(name):
            self._old.read_into(taken, state, start, target)
        else:
            target.fill_(initial_value(state))

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        taken = self._taken(name)
        if taken is not None and self._is_old(name):
            return self._old.adam_steps(taken, start, stop)
        return [(start, stop, 0)] if start < stop else []

    def _taken(self, name: str) -> str | None:
        """The tensor of the shallower model whose weights this one begins with."""
        layer = layer_of(name)
        if layer is None:
            return name
        origin = self._origins.taken[layer]
        return None if origin is None else in_layer(name, origin)

    def _is_old(self, name: str) -> bool:
        """Whether the tensor continues an old one, with its optimizer state, and is not a copy."""
        layer = layer_of(name)
        return layer is None or layer in self._old_at
