"""Where a run's state comes from: a checkpoint, or the initialiser. Growth puts a third kind on top.

A trainer reads every range it owns from one `StateSource` and never knows which kind it is, so that starting,
resuming and growing are one code path at every layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tf.checkpoint.architecture import check_growable, stored_model
from megatron_tf.checkpoint.format import MOMENTS, STATES, WEIGHT
from megatron_tf.checkpoint.ranges import StepRange, clip_steps
from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.config.schema import Growth, Model
from megatron_tf.growth.source import GrownSource, StateSource, copy_in_slices, growth_entry, growth_seed
from megatron_tf.params import initial_scales, parameter_table

__all__ = [
    "CheckpointSource",
    "FreshSource",
    "InitialSource",
    "StateSource",
    "StepZero",
    "WeightsSource",
    "grow",
    "grown_source",
]


class CheckpointSource:
    """The state that a checkpoint holds. Moments that it does not hold are 0, like those of a fresh model."""

    def __init__(self, reader: CheckpointReader):
        self._reader = reader

    @property
    def scales(self) -> Mapping[str, float]:
        return self._reader.index.scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        return torch.zeros(stop - start) if self._lacks(name, state) else self._reader.read(name, state, start, stop)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        if self._lacks(name, state):
            target.zero_()
        else:
            self._reader.read_into(name, state, start, target)

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        """Step counts of [start, stop); 0 where the checkpoint has weights only."""
        recorded = clip_steps(self._reader.index.adam_steps.get(name, ()), start, stop)
        return recorded or ([(start, stop, 0)] if start < stop else [])

    def _lacks(self, name: str, state: str) -> bool:
        tensor = self._reader.index.tensors.get(name)
        return state in MOMENTS and tensor is not None and state not in tensor.states


class FreshSource:
    """The weights and τ of another source; moments and step counts are 0."""

    def __init__(self, weights: StateSource):
        self._weights = weights

    @property
    def scales(self) -> Mapping[str, float]:
        return self._weights.scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        return self._weights.read(name, state, start, stop) if state == WEIGHT else torch.zeros(stop - start)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        if state == WEIGHT:
            self._weights.read_into(name, state, start, target)
        else:
            target.zero_()

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        return [(start, stop, 0)] if start < stop else []


class InitialSource:
    """The state of a fresh model: weights as a function of (seed, name, row), moments and step counts 0."""

    def __init__(self, model: Model, seed: int):
        self._table, self._seed = parameter_table(model), seed
        self.scales: Mapping[str, float] = initial_scales(model)

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        assert state in STATES
        if state != WEIGHT or start == stop:
            return torch.zeros(stop - start)
        from megatron_tf.model.initialize import initial_rows

        spec = self._table[name]
        first, last = start // spec.width, -(-stop // spec.width)
        rows = initial_rows(spec, self._seed, first, last).reshape(-1)
        return rows[start - first * spec.width : stop - first * spec.width]

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        copy_in_slices(lambda low, high: self.read(name, state, low, high), start, target)

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        return [(start, stop, 0)] if start < stop else []


class WeightsSource:
    """The state of weights that come from elsewhere: of any float type, in their logical shapes; moments and step
    counts are 0."""

    def __init__(self, weights: Mapping[str, Tensor], scales: Mapping[str, float]):
        self._weights, self.scales = weights, scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        target = torch.empty(stop - start)
        self.read_into(name, state, start, target)
        return target

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        if state == WEIGHT:
            target.copy_(self._weights[name].reshape(-1)[start : start + target.numel()])
        else:
            target.zero_()

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        return [(start, stop, 0)] if start < stop else []


def grown_source(reader: CheckpointReader, model: Model, growth: Growth, seed: int) -> GrownSource:
    """The state of the bigger `model`, grown from an open checkpoint as `growth` says.

    `seed` is the run's; new tokens depend on it and on how many growths came before. ConfigError when a
    method cannot grow this model; see `check_growable` for what may differ between the two models.
    """
    own_seed = growth_seed(seed, len(reader.index.growth_history) + 1)
    return GrownSource(
        CheckpointSource(reader),
        InitialSource(model, own_seed),
        old_model=stored_model(reader.index),
        new_model=model,
        growth=growth,
        seed=own_seed,
    )


@dataclass(frozen=True)
class StepZero:
    """What a run begins with: its state, its position, and the history of the models before it.

    `samples`: position in the data.  `tokens`: trained on since the very first model.
    """

    source: StateSource
    samples: int
    tokens: int
    growth_history: tuple[Mapping[str, Any], ...]


def grow(
    reader: CheckpointReader, model: Model, growth: Growth, *, seed: int, data: Mapping[str, Any] | None
) -> StepZero:
    """The bigger `model` from an open checkpoint: the one growth of trainer and tool.

    `seed`: the run's.  `data`: fingerprint of the data that the bigger model is trained on. It goes on where the smaller
    one stopped if that is the same, and otherwise begins at its beginning; None stands for the same.
    ConfigError, with all problems, when more than token counts differ or a method cannot grow this model.
    """
    index = reader.index
    check_growable(index, model)
    source = grown_source(reader, model, growth, seed)
    entry = growth_entry(
        method=source.method, moments=growth.moments, source=str(reader.path), step=index.step, samples=index.samples,
        tokens=index.tokens, old_model=stored_model(index), new_model=model,
    )  # fmt: skip
    entry |= {"noise": growth.noise, "preserves": source.preserves}
    same_data = data is None or dict(index.data) == dict(data)
    return StepZero(source, index.samples if same_data else 0, index.tokens, (*index.growth_history, entry))
