"""A grown model's state, computed while it is read.

Growth is a pure function on logical state: `GrownSource` answers for any range of the bigger model from the
smaller one's state and the initialiser. Nothing is materialised, no rank is known, so it works the same at every
layout, in the trainer and in a tool that writes the grown checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from megatron_tf.config.schema import Model
from megatron_tf.growth.methods import METHODS, NewElements, NewTokens, Projection
from megatron_tf.params import parameter_table, projection_tokens

WEIGHT = "weight"
SLICE_ELEMENTS = 2**20  # 4 MiB in fp32


class StateSource(Protocol):
    """Everything a run starts from, by logical tensor and range.

    States: "weight" (fp32 master), "exp_avg", "exp_avg_sq" (Adam moments).
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


def growth_seed(seed: int, number: int) -> int:
    """Seed of a run's `number`-th growth, so that the tokens of each growth are drawn apart from all others."""
    return int.from_bytes(hashlib.sha256(f"growth {number} of {seed}".encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class _Grown:
    """A tensor that grows: elements from `old_numel` on are `new`'s."""

    old_numel: int
    projection: str
    kind: str  # "key" or "value"


class GrownSource:
    """State of `new_model`, grown from `old` (state of `old_model`) with new values from `fresh` (of `new_model`).

    `method`: a name of METHODS.  `moments`: "keep" leaves the old elements' Adam moments and step counts, "reset"
    starts all of the model's, also those of tensors that do not grow, at 0. New elements always start at 0.
    The models may differ in token counts only, and none may shrink: the caller has checked that.
    ConfigError when the method cannot grow the activation.
    """

    def __init__(
        self,
        old: StateSource,
        fresh: StateSource,
        *,
        old_model: Model,
        new_model: Model,
        method: str,
        moments: Literal["keep", "reset"],
    ):
        self._old, self._fresh, self._reset = old, fresh, moments == "reset"
        self._tensors: dict[str, _Grown] = {}
        self._new_tokens: dict[str, NewTokens] = {}
        before, after = projection_tokens(old_model), projection_tokens(new_model)
        shapes = parameter_table(old_model)
        scales = dict(old.scales)
        for name in after:
            assert before[name] <= after[name]
            if before[name] == after[name]:
                continue
            keys, values = f"{name}.key_tokens", f"{name}.value_tokens"
            for tensor, kind in ((keys, "key"), (values, "value")):
                self._tensors[tensor] = _Grown(shapes[tensor].numel, name, kind)
            projection = Projection(
                name, new_model.activation, scales[name], self._initial(keys), self._initial(values)
            )
            self._new_tokens[name] = METHODS[method](projection)
            scales[name] = self._new_tokens[name].scale
        self.scales: Mapping[str, float] = scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        boundary = self._boundary(name, start, stop)
        parts = [torch.empty(0)] if start == stop else []
        if start < boundary:
            kept = state == WEIGHT or not self._reset
            parts.append(self._old.read(name, state, start, boundary) if kept else torch.zeros(boundary - start))
        if boundary < stop:
            parts.append(self._new(name, boundary, stop) if state == WEIGHT else torch.zeros(stop - boundary))
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        copy_in_slices(lambda low, high: self.read(name, state, low, high), start, target)

    def adam_steps(self, name: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        if self._reset:
            return [(start, stop, 0)] if start < stop else []
        boundary = self._boundary(name, start, stop)
        steps = self._old.adam_steps(name, start, boundary) if start < boundary else []
        if boundary == stop:
            return steps
        if steps and steps[-1][2] == 0:  # the old elements are as young as the new ones
            boundary = steps.pop()[0]
        return [*steps, (boundary, stop, 0)]

    def _boundary(self, name: str, start: int, stop: int) -> int:
        """Where in [start, stop] the new elements begin."""
        grown = self._tensors.get(name)
        return stop if grown is None else min(max(grown.old_numel, start), stop)

    def _new(self, name: str, start: int, stop: int) -> Tensor:
        grown = self._tensors[name]
        tokens = self._new_tokens[grown.projection]
        return (tokens.keys if grown.kind == "key" else tokens.values)(start, stop)

    def _initial(self, tensor: str) -> NewElements:
        return lambda start, stop: self._fresh.read(tensor, WEIGHT, start, stop)


def growth_entry(
    *, method: str, moments: str, source: str, step: int, samples: int, tokens: int, old_model: Model, new_model: Model
) -> dict[str, Any]:
    """The entry that a growth adds to the checkpoint's history, ready for JSON.

    `source`: the checkpoint grown from.  `step`, `samples`, `tokens`: how far that one was trained.
    "from" and "to" are the token counts by kind. The losses on a held batch are None until the trainer measures them.
    """
    return {
        "method": method,
        "moments": moments,
        "source": source,
        "step": step,
        "samples": samples,
        "tokens": tokens,
        "from": old_model.parameter_tokens.model_dump(),
        "to": new_model.parameter_tokens.model_dump(),
        "loss_before": None,
        "loss_after": None,
    }
