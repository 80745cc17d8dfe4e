"""Splitting: the tokens of a dense projection, or of existing candidates, are copied to new candidates.

In a dense projection, the tokens of each slot are copied to all candidates of the slot. Whichever one a position
chooses, it finds the tokens that it used before. So the function is kept exactly, for any router and any activation, at
the same τ. There are `candidates` times as many tokens, and a position uses no more of them than before. From then on
the copies see different positions and diverge.

| tensor of the bigger model | initial value |
|---|---|
| `bank.key_tokens`, `bank.value_tokens` | row (slot, candidate, token) is old row dense + slot · g + token |
| `key_tokens`, `value_tokens`, where some stay dense | the first of the old tokens |
| `bank.router` | random; a run fits it to its data, see `growth.routers` |
| `bank.balance` | 0, likewise |
| all others | unchanged |

When candidates are split again, with c copies of each of the m:

| tensor of the bigger model | initial value of copy k of candidate j, which is candidate j · c + k of its slot |
|---|---|
| `bank.key_tokens`, `bank.value_tokens`, `bank.balance` | those of candidate j |
| `bank.router` | ρ_j + δ_k, with δ_k the initialiser's row of candidate k of the slot: the same for all j |
| all others | unchanged |

A position chooses the largest x·(ρ_j + δ_k) + 10 b_j. That is a sum of a part with j and a part with k, so the largest
one has the j with the largest x·ρ_j + 10 b_j and the k with the largest x·δ_k: the position chooses a copy of the
candidate that it chose before. This holds for any routers, balances and δ, and for ties: of equal sums the first is
chosen, which has the first j, and then the first k. All copies of j hold the same tokens and the gate is 1, so the
function is kept exactly, except where two candidates differ by no more than rounding and a position chooses the other
one. If positions choose evenly among the δ_k, each copy has the same load, relative to an equal share, as candidate j
had, so the balance does not have to change.

The optimizer's states and step counts are copied with tokens, routers and balances.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_tf.architectures.tokenformer.section import TokenFormerModel, as_tokenformer, bank_of, banks_of
from megatron_tf.config.differences import TOKENS, differing
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.growth.methods import Elements
from megatron_tf.growth.noise import noise
from megatron_tf.state.optimizer_states import WEIGHT
from megatron_tf.state.parameters import parameter_table, projections
from megatron_tf.state.ranges import StepRange, add_steps
from megatron_tf.state.sources import DerivedSource, StateSource, copy_in_slices


@dataclass(frozen=True)
class Copies:
    """A tensor of copies: every group of `size` elements of an old tensor, from element `first` on, `count` times.

    `candidates`: for routers, the number of candidates of a slot: each copy k gets δ_k added, see above. 0: no δ.
    """

    first: int
    size: int
    count: int
    candidates: int = 0

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, start in the old tensor) for each part of elements [start, stop) that is one range there."""
        while start < stop:
            group, offset = divmod(start, self.size)
            end = min(stop, start + self.size - offset)
            yield start, end, self.first + group // self.count * self.size + offset
            start = end

    def originals(self, old: Elements, start: int, stop: int) -> Tensor:
        """The elements of which [start, stop) are copies, flat fp64. `old`: reads the old tensor."""
        return torch.cat([old(first, first + high - low) for low, high, first in self.stretches(start, stop)]).double()

    def parted(self, old: Elements, fresh: Elements, start: int, stop: int) -> Tensor:
        """Routers of copies, flat fp64: ρ_j + δ_k. `fresh`: reads the initial values of the new tensor."""
        added = []
        for low, high, _ in self.stretches(start, stop):
            row, offset = divmod(low, self.size)
            slot, candidate = divmod(row, self.candidates)
            first = (slot * self.candidates + candidate % self.count) * self.size + offset
            added.append(fresh(first, first + high - low))
        return self.originals(old, start, stop) + torch.cat(added)


class SplitSource(DerivedSource):
    """State of `new_model`, split from `old` (state of `old_model`) with routers from `fresh` (of `new_model`).

    `growth`: noise on the copies.  `seed`: of this growth. A `StateSource`.
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
        super().__init__(old)
        self._fresh = fresh
        self._growth = growth
        self._seed = seed
        self._table = parameter_table(new_model)
        self._known = parameter_table(old_model)
        self._copies = dict(_copies(as_tokenformer(old_model), as_tokenformer(new_model)))

    def read_into(self, name: str, state: str, start: int, target: Tensor) -> None:
        tensor, copies = self._copies.get(name, (name, None))
        if copies is None and name not in self._known:
            self._fresh.read_into(name, state, start, target)
        elif copies is None:
            self._source.read_into(name, state, start, target)
        elif state == WEIGHT and copies.candidates:
            routers = partial(self._source.read, name, WEIGHT), partial(self._fresh.read, name, WEIGHT)
            copy_in_slices(partial(copies.parted, *routers), start, target)
        elif state == WEIGHT and self._growth.noise and name.endswith("_tokens"):
            copy_in_slices(partial(self._noisy, name, tensor, copies), start, target)
        else:
            for low, high, old in copies.stretches(start, start + target.numel()):
                self._source.read_into(tensor, state, old, target[low - start : high - start])

    def adam_steps(self, name: str, start: int, stop: int) -> list[StepRange]:
        tensor, copies = self._copies.get(name, (name, None))
        if copies is None and name not in self._known:
            return [(start, stop, 0)] if start < stop else []
        if copies is None:
            return self._source.adam_steps(name, start, stop)
        found: list[StepRange] = []
        for low, high, old in copies.stretches(start, stop):
            for first, last, steps in self._source.adam_steps(tensor, old, old + high - low):
                add_steps(found, first - old + low, last - old + low, steps)
        return found

    def _noisy(self, name: str, tensor: str, copies: Copies, start: int, stop: int) -> Tensor:
        """Copies w of the old `tensor` as w · (1 + noise · N(0, 1)), flat fp64. Each copy has its own noise."""
        old = copies.originals(partial(self._source.read, tensor, WEIGHT), start, stop)
        return old * (1 + self._growth.noise * noise(self._table[name], self._seed, start, stop))


def copies(old: Model, new: Model) -> dict[str, tuple[str, Copies]]:
    """(Name of the old tensor, `Copies`) of each tensor of `new` that a split of `old` would copy, by name.

    Empty when `new` is no split of `old`, whatever else became of it.
    """
    if not (isinstance(old, TokenFormerModel) and isinstance(new, TokenFormerModel)):
        return {}
    if any(key.startswith(TOKENS) or key in ("num_layers", "hidden_size") for key, *_ in differing(old, new)):
        return {}
    before, after = banks_of(old), banks_of(new)
    for kind, bank in before.items():
        alike = kind in after and (after[kind].group_size, after[kind].dense) == (bank.group_size, bank.dense)
        if not alike or after[kind].candidates % bank.candidates:
            return {}
    return {} if before == after else dict(_copies(old, new))


def apart(first: Model, second: Model) -> frozenset[str]:
    """The tensors of candidates that both have, but with other rows: neither model is a split of the other.

    Slots that only one has come after those of both, so they alone change nothing.
    """
    if not (isinstance(first, TokenFormerModel) and isinstance(second, TokenFormerModel)):
        return frozenset()
    if copies(first, second) or copies(second, first):
        return frozenset()
    banks = banks_of(first), banks_of(second)
    kinds = {kind for kind in banks[0].keys() & banks[1].keys() if banks[0][kind] != banks[1][kind]}
    return frozenset(
        f"{name}.{tensor}"
        for name, projection in projections(first).items()
        if projection.kind in kinds
        for tensor in ("bank.key_tokens", "bank.value_tokens", "bank.router", "bank.balance")
    )


def _copies(old: TokenFormerModel, new: TokenFormerModel) -> Iterator[tuple[str, tuple[str, Copies]]]:
    """(name, (name of the old tensor, `Copies`)) for each tensor of the bigger model that holds copies."""
    table = parameter_table(new)
    for name, projection in projections(new).items():
        bank, before = bank_of(new, projection.kind), bank_of(old, projection.kind)
        if bank is None or bank == before:
            continue
        if before is not None:
            count = bank.candidates // before.candidates
            for tensor, rows, candidates in (
                ("key_tokens", bank.group_size, 0),
                ("value_tokens", bank.group_size, 0),
                ("router", 1, bank.candidates),
                ("balance", 1, 0),
            ):
                tensor = f"{name}.bank.{tensor}"
                yield tensor, (tensor, Copies(0, rows * table[tensor].width, count, candidates))
            continue
        for tensor in ("key_tokens", "value_tokens"):
            width = table[f"{name}.bank.{tensor}"].width
            copies = Copies(bank.dense * width, bank.group_size * width, bank.candidates)
            yield f"{name}.bank.{tensor}", (f"{name}.{tensor}", copies)
