"""The state that a checkpoint holds, as a `StateSource`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.state.optimizer_states import WEIGHT, initial_value
from megatron_tf.state.ranges import StepRange, clip_steps


class CheckpointSource:
    """The state that a checkpoint holds. Optimizer states that it does not hold are as in a fresh model."""

    def __init__(self, reader: CheckpointReader):
        self._reader = reader

    @property
    def scales(self) -> Mapping[str, float]:
        return self._reader.index.scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        if self._lacks(name, state):
            return torch.full((stop - start,), initial_value(state))
        return self._reader.read(name, state, start, stop)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        if self._lacks(name, state):
            target.fill_(initial_value(state))
        else:
            self._reader.read_into(name, state, start, target)

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        """Step counts of [start, stop); 0 where the checkpoint has weights only."""
        recorded = clip_steps(self._reader.index.adam_steps.get(name, ()), start, stop)
        return recorded or ([(start, stop, 0)] if start < stop else [])

    def _lacks(self, name: str, state: str) -> bool:
        tensor = self._reader.index.tensors.get(name)
        return state != WEIGHT and tensor is not None and state not in tensor.states
