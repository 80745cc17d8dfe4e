"""Where a run's state comes from, by logical tensor and range.

A trainer reads every range it owns from one `StateSource` and never knows which kind it is, so that starting,
resuming and growing are one code path at every layout. Here are the kinds that need no file: `checkpoint.source` has
the one that reads a checkpoint, `growth.source` and `pruning.source` those that make another model of it.
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
    """Everything a run starts from, by logical tensor and range.

    States: "weight" (fp32 master), and under the names that the optimizer declares what it keeps in addition.
    """

    @property
    def scales(self) -> Mapping[str, float]:
        """τ of every projection."""
        ...

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened logical tensor `name`: flat fp32 on the CPU."""
        ...

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        """Fill the flat fp32 `target`, on any device, from element `start` on; holds one bounded buffer besides."""
        ...

    def adam_steps(self, name: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Optimizer steps that these elements have had: (start, stop, steps) in order, covering [start, stop)."""
        ...


def copy_in_slices(read: Callable[[int, int], Tensor], start: int, target: Tensor) -> None:
    """Fill `target` from element `start` on with what `read` gives for [low, high), a bounded slice at a time."""
    for low in range(0, target.numel(), SLICE_ELEMENTS):
        part = target[low : low + SLICE_ELEMENTS]
        part.copy_(read(start + low, start + low + part.numel()))


def read_whole(source: StateSource, name: str, state: str, start: int, stop: int) -> Tensor:
    """What `source.read_into` fills for elements [start, stop): the `read` of a source that computes in there."""
    result = torch.empty(stop - start)
    source.read_into(name, state, start, result)
    return result


class FreshSource:
    """The weights and τ of another source; nothing updated so far."""

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


class InitialSource:
    """The state of a fresh model: weights as a function of (seed, name, row), nothing updated so far.

    `sizes`: what the weights of a parameter are multiplied by, where that is not 1.
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
    """The state that the run begins with when it has none from elsewhere."""
    sizes = {name: of.initial for name, of in factors(config.model, config.optimizer).items() if of.initial != 1}
    return InitialSource(config.model, config.run.seed, sizes)


class WeightsSource:
    """The state of weights that come from elsewhere: of any float type, in their logical shapes; nothing updated so
    far."""

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
    """What a run begins with: its state, its position, and the history of the models before it.

    `samples`: position in the data.  `tokens`: trained on since the very first model.
    `states`: of each parameter, the weight and what the optimizer keeps in addition.
    """

    source: StateSource
    samples: int
    tokens: int
    growth_history: tuple[Mapping[str, Any], ...]
    states: tuple[str, ...] = STATES
