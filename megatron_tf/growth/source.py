"""A grown model's state, computed while it is read.

Growth is a pure function on logical state: `GrownSource` computes any range of the bigger model from the state of the
smaller one and the initialiser. No tensor is held whole and ranks are not known, so it works the same at every layout,
in the trainer and in a tool that writes the grown checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import ConfigError
from megatron_tf.growth.axes import steps
from megatron_tf.growth.methods import Elements, NewTokens, method_named
from megatron_tf.growth.noise import noise
from megatron_tf.growth.rules import growth_problems
from megatron_tf.growth.tokens import decide, growing
from megatron_tf.state.optimizer_states import WEIGHT, declared_states, initial_value
from megatron_tf.state.parameters import parameter_table
from megatron_tf.state.sources import DerivedSource, FreshSource, StateSource, copy_in_slices, read_whole

PRUNED = "pruned"  # in place of a method, in the history of a model that has lost tokens


def growth_seed(seed: int, number: int) -> int:
    """The seed of a run's `number`-th growth, so that each growth draws its tokens independently of all others."""
    return int.from_bytes(hashlib.sha256(f"growth {number} of {seed}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class _Grown:
    """A tensor that grows: its elements from `old_numel` on are new."""

    old_numel: int
    projection: str
    part: str  # its name in the projection
    is_value: bool


class GrownSource:
    """State of `new_model`, grown from `old` (state of `old_model`) with new values from `fresh` (of `new_model`).

    `growth`: the methods, noise, and the treatment of moments. "keep": old elements keep their optimizer states and
    step counts, and copies made by a split take over those of their originals; a growth of the width keeps none.
    "reset": all elements of the model start afresh, even those of tensors that do not grow. Other new elements always
    start afresh.  `seed`: of this growth, see `growth_seed`.
    ConfigError, with all problems, when the one model cannot grow into the other, see `growth.rules`, or a method
    cannot grow its projection. That is decided without reading state.

    `record`: the fields that the growth adds to the checkpoint's history.
    `preserves`: whether the growth promises to keep the function, to rounding.
    """

    def __init__(
        self,
        old: StateSource,
        fresh: StateSource,
        *,
        old_model: Model,
        new_model: Model,
        growth: Growth,
        seed: int,
    ):
        if problems := growth_problems(old_model, new_model, growth):
            raise ConfigError(problems)
        source, preserves = old, True
        record: dict[str, Any] = {"method": {}}
        for axis, before, after in steps(old_model, new_model):
            source = axis.source(source, fresh, old_model=before, new_model=after, growth=growth, seed=seed)
            record |= axis.record(before, after, growth)
            preserves = preserves and axis.preserves(before, after, growth)
        if growth.moments == "reset":
            source = FreshSource(source)
        elif growth.moments_factor != 1:
            source = ScaledSource(source, growth.moments_factor)
            record["moments_factor"] = growth.moments_factor
        self._source = source
        self.record: Mapping[str, Any] = record
        self.preserves = preserves

    @property
    def scales(self) -> Mapping[str, float]:
        return self._source.scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        return self._source.read(name, state, start, stop)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        self._source.read_into(name, state, start, target)

    def adam_steps(self, name: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        return self._source.adam_steps(name, start, stop)


class ScaledSource(DerivedSource):
    """The state of another source, as if all gradients so far had been multiplied by `factor`.

    An update of Adam is the same at first. The smaller the factor is, the sooner updates follow later gradients.
    """

    def __init__(self, source: StateSource, factor: float):
        super().__init__(source)
        self._factor = factor

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        super().read_into(name, state, start, target)
        power = 0 if state == WEIGHT else declared_states()[state].gradient_power
        if power > 0:
            target.mul_(self._factor**power)


class AppendedSource:
    """State of `new_model`, which has more tokens than `old_model`, from `old` with new values from `fresh`.

    `growth`: the method of each projection, and noise.  `seed`: of this growth, see `growth_seed`.
    ConfigError, with all problems, when a method cannot grow its projection. That is decided without reading state.

    A read computes whatever is not a plain copy in fp64 and rounds once, to the type of its target. So the result does
    not depend on the ranges that are read, nor on the device of the target.
    """

    def __init__(
        self,
        old: StateSource,
        fresh: StateSource,
        *,
        old_model: Model,
        new_model: Model,
        growth: Growth,
        seed: int,
    ):
        self._old = old
        self._fresh = fresh
        self._growth = growth
        self._seed = seed
        self._shapes = parameter_table(new_model)
        self._tensors: dict[str, _Grown] = {}
        old_shapes = parameter_table(old_model)
        self._projections = growing(
            old_model,
            new_model,
            growth,
            old.scales,
            seed,
            lambda tensor: self._weights_of(old, tensor),
            lambda tensor: self._weights_of(fresh, tensor),
        )
        for name, projection in self._projections.items():
            for part in (*projection.initial_keys, *projection.initial_values):
                tensor = f"{name}.{part}"
                is_value = part in projection.initial_values
                self._tensors[tensor] = _Grown(old_shapes[tensor].numel, name, part, is_value)
        decided = decide(self._projections, growth)
        scales = {**old.scales, **{name: tokens.scale for name, tokens in decided.items()}}
        factors = {name: tokens.old_values_factor for name, tokens in decided.items()}
        self.scales: Mapping[str, float] = scales
        self._factors = factors
        self._latest: tuple[str, NewTokens] | None = None

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        return read_whole(self, name, state, start, stop)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        boundary = self._boundary(name, start, start + target.numel())
        old, new = target[: boundary - start], target[boundary - start :]
        if len(old):
            self._read_old(name, state, start, old)
        if len(new):
            elements = self._new_elements(name) if state == WEIGHT else None
            if elements is None:
                new.fill_(0.0 if state == WEIGHT else initial_value(state))
            else:
                copy_in_slices(elements, boundary, new)

    def adam_steps(self, name: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        boundary = self._boundary(name, start, stop)
        steps = self._old.adam_steps(name, start, boundary) if start < boundary else []
        if boundary == stop:
            return steps
        if steps and steps[-1][2] == 0:  # the old elements have no updates either: one range
            boundary = steps.pop()[0]
        return [*steps, (boundary, stop, 0)]

    def _boundary(self, name: str, start: int, stop: int) -> int:
        """The element in [start, stop] from which on elements are new."""
        grown = self._tensors.get(name)
        return stop if grown is None else min(max(grown.old_numel, start), stop)

    def _read_old(self, name: str, state: str, start: int, target: Tensor) -> None:
        if (factor := self._factor(name, state)) != 1 or (state == WEIGHT and self._noisy(name)):
            copy_in_slices(lambda low, high: self._changed(name, state, low, high, factor), start, target)
        else:
            self._old.read_into(name, state, start, target)

    def _factor(self, name: str, state: str) -> float:
        """The factor of old elements. The optimizer's states change as the gradients do, see `OptimizerState`."""
        grown = self._tensors.get(name)
        factor = self._factors[grown.projection] if grown is not None and grown.is_value else 1.0
        return factor if state == WEIGHT else declared_states()[state].factor(factor)

    def _noisy(self, name: str) -> bool:
        return self._growth.noise > 0 and name in self._tensors and name.endswith("_tokens")

    def _changed(self, name: str, state: str, start: int, stop: int, factor: float) -> Tensor:
        """Old elements, fp64: times `factor`, and weights w with noise as w · (1 + noise · N(0, 1))."""
        elements = self._old.read(name, state, start, stop).to(torch.float64) * factor
        if state == WEIGHT and self._noisy(name):
            elements *= 1 + self._growth.noise * noise(self._shapes[name], self._seed, start, stop)
        return elements

    def _new_elements(self, tensor: str) -> Elements | None:
        grown = self._tensors[tensor]
        # Only the latest projection's new tokens are kept, because a method may hold memory for them.
        if self._latest is None or self._latest[0] != grown.projection:
            self._latest = grown.projection, self._tokens_of(grown.projection)
        return self._latest[1].elements(grown.part)

    def _tokens_of(self, name: str) -> NewTokens:
        projection = self._projections[name]
        return method_named(self._growth.method_of(projection.kind))(projection)

    @staticmethod
    def _weights_of(source: StateSource, tensor: str) -> Elements:
        return lambda start, stop: source.read(tensor, WEIGHT, start, stop)


def growth_entry(
    *,
    method: str | Mapping[str, str],
    moments: str,
    source: str,
    step: int,
    samples: int,
    tokens: int,
    old_model: Model,
    new_model: Model,
) -> dict[str, Any]:
    """The entry that a growth adds to the checkpoint's history, ready for JSON.

    `method`: of all projections, or by kind.  `source`: the path of the old checkpoint.  `step`, `samples`, `tokens`:
    how far that one was trained. "from" and "to" are the token counts by kind. The record of a growth adds further
    fields, such as "layers" in depth, see `growth.layers`. The losses on a held batch are None until the trainer
    measures them.
    """
    return {
        "method": method,
        "moments": moments,
        "source": source,
        "step": step,
        "samples": samples,
        "tokens": tokens,
        "from": architecture_of(old_model).token_counts(old_model),
        "to": architecture_of(new_model).token_counts(new_model),
        "loss_before": None,
        "loss_after": None,
    }
