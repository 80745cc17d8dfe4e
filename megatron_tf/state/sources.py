"""Sources of a run's state, by logical tensor and range.

A trainer reads every range that it owns from one `StateSource` and does not know which kind it is, so that starting,
resuming and growing are one code path at every layout. Here are the kinds that need no file: `checkpoint.source` has
the one that reads a checkpoint, `growth.source` and `pruning.source` those that transform it into another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.state.initialize import initial_rows
from megatron_tf.state.lr_rule import factors
from megatron_tf.state.optimizer_states import STATES, WEIGHT, initial_value
from megatron_tf.state.parameters import initial_scales, parameter_table
from megatron_tf.state.ranges import StepRange

SLICE_ELEMENTS = 2**20  # 4 MiB in fp32


class StateSource(Protocol):
    """The state that a run starts from, by logical tensor and range.

    States: "weight" (fp32 master), and those of the optimizer under the names that it declares.
    """

    @property
    def scales(self) -> Mapping[str, float]:
        """τ of every projection."""
        ...

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened logical tensor `name`: flat fp32 on the CPU."""
        ...

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        """Fills the flat fp32 `target`, on any device, from element `start` on. Needs one further buffer, bounded."""
        ...

    def adam_steps(self, name: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The optimizer steps of these elements: (start, stop, steps) in order, covering [start, stop)."""
        ...


def copy_in_slices(read: Callable[[int, int], Tensor], start: int, target: Tensor) -> None:
    """Fills the flat `target` with read(low, high) for elements from `start` on, a bounded slice at a time."""
    for low in range(0, target.numel(), SLICE_ELEMENTS):
        part = target[low : low + SLICE_ELEMENTS]
        part.copy_(read(start + low, start + low + part.numel()))


def read_whole(source: StateSource, name: str, state: str, start: int, stop: int) -> Tensor:
    """Elements [start, stop), flat fp32: implements `read` by `read_into`, for sources that compute in the latter."""
    result = torch.empty(stop - start)
    source.read_into(name, state, start, result)
    return result


class FreshSource:
    """The weights and τ of another source, with the optimizer's states and step counts of a fresh model."""

    def __init__(self, weights: StateSource):
        self._weights = weights

    @property
    def scales(self) -> Mapping[str, float]:
        return self._weights.scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        if state != WEIGHT:
            return _initial(state, stop - start)
        return self._weights.read(name, state, start, stop)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        if state == WEIGHT:
            self._weights.read_into(name, state, start, target)
        else:
            target.fill_(initial_value(state))

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        return [(start, stop, 0)] if start < stop else []


class DerivedSource:
    """State that is computed from that of another `source`, with its τ. Derived classes override `read_into`, and
    `adam_steps` where step counts differ."""

    def __init__(self, source: StateSource):
        self._source = source

    @property
    def scales(self) -> Mapping[str, float]:
        return self._source.scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        return read_whole(self, name, state, start, stop)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        self._source.read_into(name, state, start, target)

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        return self._source.adam_steps(name, start, stop)


class WithWeights(DerivedSource):
    """The state of another source, with other `weights` of some parameters, in their logical shapes."""

    def __init__(self, source: StateSource, weights: Mapping[str, Tensor]):
        super().__init__(source)
        self._weights = {name: weight.flatten() for name, weight in weights.items()}

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        if state == WEIGHT and name in self._weights:
            target.copy_(self._weights[name][start : start + target.numel()])
        else:
            super().read_into(name, state, start, target)


class InitialSource:
    """The state of a fresh model: weights as a function of (seed, name, row), without any update.

    `sizes`: factors of the initial weights by parameter, where they are not 1.
    """

    def __init__(self, model: Model, seed: int, sizes: Mapping[str, float] | None = None):
        self._sizes = sizes or {}
        self._table = parameter_table(model)
        self._seed = seed
        self.scales: Mapping[str, float] = initial_scales(model)

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        if state != WEIGHT:
            return _initial(state, stop - start)
        if start == stop:
            return torch.empty(0)
        spec = self._table[name]
        first, last = start // spec.width, -(-stop // spec.width)
        rows = initial_rows(spec, self._seed, first, last).reshape(-1)
        own = rows[start - first * spec.width : stop - first * spec.width]
        return own.mul_(self._sizes[name]) if name in self._sizes else own

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        copy_in_slices(lambda low, high: self.read(name, state, low, high), start, target)

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        return [(start, stop, 0)] if start < stop else []


def initial_source(config: RunConfig) -> InitialSource:
    """The state that a run trained from scratch begins with."""
    sizes = {name: of.initial for name, of in factors(config.model, config.optimizer).items() if of.initial != 1}
    return InitialSource(config.model, config.run.seed, sizes)


class WeightsSource:
    """Given weights, of any float type and in their logical shapes, with the optimizer's states and step counts of a
    fresh model."""

    def __init__(self, weights: Mapping[str, Tensor], scales: Mapping[str, float]):
        self._weights = weights
        self.scales = scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        target = torch.empty(stop - start)
        self.read_into(name, state, start, target)
        return target

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        if state == WEIGHT:
            target.copy_(self._weights[name].reshape(-1)[start : start + target.numel()])
        else:
            target.fill_(initial_value(state))

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        return [(start, stop, 0)] if start < stop else []


def _initial(state: str, numel: int) -> Tensor:
    return torch.full((numel,), initial_value(state))


@dataclass(frozen=True)
class StepZero:
    """The start of a run: its state, its position, and the history of the models before it.

    `samples`: position in the training data.  `tokens`: trained on since the very first model.
    `growth_history`: one JSON object for each growth or pruning so far.
    `states`: the names of the states of each parameter, the weight and those of the optimizer.
    """

    source: StateSource
    samples: int
    tokens: int
    growth_history: tuple[Mapping[str, Any], ...]
    states: tuple[str, ...] = STATES
