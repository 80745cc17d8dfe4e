"""The state of a wider model, computed while it is read. `growth.width` has its definition and the proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_tf.architectures.spec import ParameterSpec
from megatron_tf.config.sections.model import Model
from megatron_tf.growth.noise import noise
from megatron_tf.state.optimizer_states import WEIGHT, initial_value
from megatron_tf.state.parameters import layer_of, parameter_table
from megatron_tf.state.ranges import StepRange
from megatron_tf.state.sources import StateSource, copy_in_slices, read_whole


class ClonedSource:
    """State of `new_model`, whose tensors repeat those of `old_model`.

    `noise`: `growth.clone_noise`.  `seed`: of this growth.
    A `StateSource`. It computes in fp64 and rounds once, to the type of the target; it holds the rows that are read.
    """

    def __init__(self, old: StateSource, old_model: Model, new_model: Model, noise: float, seed: int):
        self._old = old
        self._before = parameter_table(old_model)
        self._after = parameter_table(new_model)
        self._noise = noise
        self._seed = seed
        self.scales: Mapping[str, float] = old.scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        return read_whole(self, name, state, start, stop)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        if state != WEIGHT:
            target.fill_(initial_value(state))
        elif self._before[name].shape == self._after[name].shape:
            self._old.read_into(name, state, start, target)
        else:
            copy_in_slices(lambda low, high: self._weights(name, low, high), start, target)

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        return [(start, stop, 0)] if start < stop else []

    def _weights(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the wider tensor, flat, fp64."""
        before, after = self._before[name], self._after[name]
        if len(after.shape) == 1:
            # the final norm: a row is a channel, and each logit adds up all clones of it
            indices = torch.arange(start, stop) % before.numel
            whole = self._old.read(name, WEIGHT, 0, before.numel).double()
            return whole[indices] * before.numel / after.numel
        first, last = start // after.width, -(-stop // after.width)
        rows = torch.cat([self._old_rows(name, *run) for run in _runs(first, last, before.shape[0])])
        rows = rows.repeat(1, after.width // before.width)
        if layer_of(name) is not None:
            rows *= self._share(before, after, first, last)
        return rows.view(-1)[start - first * after.width : stop - first * after.width]

    def _old_rows(self, name: str, first: int, last: int) -> Tensor:
        width = self._before[name].width
        return self._old.read(name, WEIGHT, first * width, last * width).double().view(-1, width)

    def _share(self, before: ParameterSpec, after: ParameterSpec, first: int, last: int) -> Tensor:
        """What a weight of rows [first, last) of a block's matrix is of the one that it repeats, [rows, columns]."""
        own = self._drawn(after, first, last)
        if before.output:
            # its rows are its inputs
            copies = after.shape[0] // before.shape[0]
            runs = [
                torch.cat([self._drawn(after, copy * before.shape[0] + low, copy * before.shape[0] + high)
                           for low, high in _runs(first, last, before.shape[0])])
                for copy in range(copies)
            ]  # fmt: skip
            mean = torch.stack(runs).mean(0)
        else:
            copies = after.width // before.width
            mean = own.view(len(own), copies, before.width).mean(1).repeat(1, copies)
        return (1 + self._noise * (own - mean)) / copies

    def _drawn(self, spec: ParameterSpec, first: int, last: int) -> Tensor:
        return noise(spec, self._seed, first * spec.width, last * spec.width).view(-1, spec.width)


def _runs(first: int, last: int, rows: int) -> Iterator[tuple[int, int]]:
    """Rows [first, last) of a repeated tensor as ranges of the `rows` that it repeats, in order."""
    while first < last:
        low = first % rows
        high = min(rows, low + last - first)
        yield low, high
        first += high - low
