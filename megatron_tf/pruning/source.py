"""The state of a model without some of its parameter tokens, computed while it is read: the inverse of growth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_tf.checks import check_scale
from megatron_tf.errors import ArgumentError
from megatron_tf.pruning.criterion import check_kept
from megatron_tf.state.parameters import ParameterSpec
from megatron_tf.state.ranges import StepRange, add_steps
from megatron_tf.state.sources import SLICE_ELEMENTS, StateSource, read_whole


class PrunedSource:
    """State of a smaller model: some rows of `old`, in their order, with their Adam moments and step counts.

    `table`: parameters of the smaller model.  `kept`: for each projection that loses tokens the old rows that stay,
    ascending [n_new].  `scales`: τ' of these projections. Keys and values that stay are not rescaled.
    A `StateSource`; holds one bounded buffer while it is read. ArgumentError when `kept` or `scales` do not fit the
    models.
    """

    def __init__(
        self,
        old: StateSource,
        table: Mapping[str, ParameterSpec],
        kept: Mapping[str, Tensor],
        scales: Mapping[str, float],
    ):
        for name, rows in kept.items():
            if f"{name}.key_tokens" not in table:
                raise ArgumentError(f"kept: names {name!r}, which is no projection of the smaller model.")
            check_kept(f"kept[{name!r}]", rows)
            if len(rows) != (tokens := table[f"{name}.key_tokens"].shape[0]):
                raise ArgumentError(f"kept[{name!r}]: keeps {len(rows)} tokens, the smaller model has {tokens}.")
        for name, scale in scales.items():
            if name not in old.scales:
                raise ArgumentError(f"scales: names {name!r}, of which the old state has no τ.")
            check_scale(f"scales[{name!r}]", scale)
        self._old = old
        self._table = table
        self._rows = {tensor: rows for name, rows in kept.items() for tensor in table if tensor.startswith(f"{name}.")}
        self.scales: Mapping[str, float] = {**old.scales, **scales}

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor: flat fp32 on the CPU."""
        return read_whole(self, name, state, start, stop)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        """Fills the flat fp32 `target` from element `start` on. Reads the old tensor in long ranges, not by row."""
        if name not in self._rows:
            self._old.read_into(name, state, start, target)
            return
        width, done = self._table[name].width, 0
        for rows in self._stretches(name, start // width, -(-(start + target.numel()) // width)):
            first = int(rows[0])
            stretch = self._old.read(name, state, first * width, (int(rows[-1]) + 1) * width)
            part = stretch.view(-1, width)[rows - first].view(-1)
            if not done:
                part = part[start % width :]
            part = part[: target.numel() - done]
            target[done : done + len(part)] = part
            done += len(part)

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        """The optimizer steps of these elements: (start, stop, steps) in order, covering [start, stop)."""
        if name not in self._rows:
            return self._old.adam_steps(name, start, stop)
        found: list[StepRange] = []
        for first, last, offset in self._runs(name):
            first, last = max(first, start), min(last, stop)
            if first >= last:
                continue
            for low, high, steps in self._old.adam_steps(name, first + offset, last + offset):
                add_steps(found, low - offset, high - offset, steps)
        return found

    def _stretches(self, name: str, first: int, last: int) -> Iterator[Tensor]:
        """The old rows of rows [first, last), in portions that each span a bounded part of the old tensor."""
        rows, span = self._rows[name][first:last], max(1, SLICE_ELEMENTS // self._table[name].width)
        while len(rows):
            count = int(torch.searchsorted(rows, rows[0] + span))
            yield rows[:count]
            rows = rows[count:]

    def _runs(self, name: str) -> Iterator[tuple[int, int, int]]:
        """(start, stop, offset) of each contiguous run: elements [start, stop) are old ones from start + offset on."""
        rows, width = self._rows[name], self._table[name].width
        shift = rows - torch.arange(len(rows))
        shifts, counts = torch.unique_consecutive(shift, return_counts=True)
        start = 0
        for offset, count in zip(shifts.tolist(), counts.tolist()):
            yield start * width, (start + count) * width, offset * width
            start += count
