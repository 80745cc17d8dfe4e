"""The state of a model with fewer candidates, computed while it is read: the inverse of splitting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_tf.config.sections.model import Model
from megatron_tf.model import build_model
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.pruning.candidates import even_shares
from megatron_tf.state.optimizer_states import WEIGHT
from megatron_tf.state.parameters import parameter_table, projections
from megatron_tf.state.ranges import StepRange, add_steps
from megatron_tf.state.sources import StateSource, copy_in_slices, read_whole


@dataclass(frozen=True)
class _Mixed:
    """A tensor of the smaller model. From element `first` on, its groups of `size` elements are means of groups of the
    old tensor `name`, with the shares of `mixture`. The elements before `first` are the old tensor of its own name."""

    name: str
    first: int
    size: int
    mixture: Tensor

    def groups(self, start: int, stop: int) -> Iterator[tuple[int, int, list[tuple[int, float]]]]:
        """For each part of elements [start, stop) that lies in one group: (start, stop, [(start in the old tensor,
        share), ...])."""
        slots, count, candidates = self.mixture.shape
        while start < stop:
            group, offset = divmod(start - self.first, self.size)
            end = min(stop, start + self.size - offset)
            slot, candidate = divmod(group, count)
            shares = self.mixture[slot, candidate]
            yield (
                start,
                end,
                [
                    ((slot * candidates + old) * self.size + offset, float(shares[old]))
                    for old in shares.nonzero().flatten().tolist()
                ],
            )
            start = end


class CondensedSource:
    """State of `model`, which has fewer candidates than `old_model`: means of the candidates of `old`.

    `mixtures`: of each projection that loses candidates, see `pruning.candidates`.
    The optimizer's states are averaged in the same way. Step counts are those of the candidate with the largest share.
    A `StateSource`; holds one bounded buffer while it is read.
    """

    def __init__(self, old: StateSource, *, old_model: Model, model: Model, mixtures: Mapping[str, Tensor]):
        self._old = old
        self._mixed = dict(_mixed(old_model, model, mixtures))
        self.scales: Mapping[str, float] = old.scales

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        return read_whole(self, name, state, start, stop)

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        boundary = self._boundary(name, start, start + target.numel())
        if boundary > start:
            self._old.read_into(name, state, start, target[: boundary - start])
        if boundary == start + target.numel():
            return
        mixed = self._mixed[name]
        for low, high, parts in mixed.groups(boundary, start + target.numel()):
            part = target[low - start : high - start]
            if len(parts) == 1:
                self._old.read_into(mixed.name, state, parts[0][0], part)
            else:
                copy_in_slices(partial(self._mean, mixed.name, state, parts), 0, part)

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        boundary = self._boundary(name, start, stop)
        found = list(self._old.adam_steps(name, start, boundary)) if boundary > start else []
        if boundary == stop:
            return found
        mixed = self._mixed[name]
        for low, high, parts in mixed.groups(boundary, stop):
            first, _ = max(parts, key=lambda part: part[1])
            for begin, end, steps in self._old.adam_steps(mixed.name, first, first + high - low):
                add_steps(found, begin - first + low, end - first + low, steps)
        return found

    def _boundary(self, name: str, start: int, stop: int) -> int:
        """The element in [start, stop] from which on elements are means."""
        mixed = self._mixed.get(name)
        return stop if mixed is None else min(max(mixed.first, start), stop)

    def _mean(self, name: str, state: str, parts: list[tuple[int, float]], low: int, high: int) -> Tensor:
        return sum(  # type: ignore[return-value]
            self._old.read(name, state, first + low, first + high).double() * share for first, share in parts
        )


def _mixed(old_model: Model, model: Model, mixtures: Mapping[str, Tensor]) -> Iterator[tuple[str, _Mixed]]:
    """(name, how it is made) of each tensor of the smaller model that is made of candidates."""
    table, banks = parameter_table(model), projections(old_model)
    for name, mixture in mixtures.items():
        bank, dense_again = banks[name].bank, mixture.shape[1] == 1
        assert bank is not None
        even = even_shares(mixture)
        for tensor in (
            ("key_tokens", "value_tokens") if dense_again else ("key_tokens", "value_tokens", "router", "balance")
        ):
            old = f"{name}.bank.{tensor}"
            spec = table[f"{name}.{tensor}" if dense_again else old]
            of_tokens = tensor.endswith("_tokens")
            size = spec.width * (bank.group_size if of_tokens else 1)
            first = spec.numel - bank.slots * size if dense_again else 0
            yield spec.name, _Mixed(old, first, size, mixture if of_tokens else even)


def condensed_model(source: StateSource, model: Model) -> TokenFormer:
    """The smaller model with the weights of `source`, in fp32 on the CPU, for evaluation."""
    result = build_model(model, scales=source.scales)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            source.read_into(name, WEIGHT, 0, parameter.view(-1))
    return result.eval()
