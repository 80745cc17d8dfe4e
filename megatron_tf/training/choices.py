"""Recording the choices of the smaller model, and making a grown model follow them, for the proof of a growth.

A choice among candidates is a step function. If the scores of two candidates differ only by rounding, the grown model
may choose another one than the smaller model, although in exact arithmetic it would not. So the proof lets it choose
only among the copies of the smaller model's choice, and counts how often it would have chosen another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_tf.model.routing import choose, choose_among_copies
from megatron_tf.model.sparse_pattention import SparsePattention
from megatron_tf.parallel.collectives import all_gather


@dataclass
class Choices:
    """The choices in one projection. `candidates`: of each slot.

    `forwards`: for each forward pass int64 [rows, slots], all slots on every tensor rank.
    """

    candidates: int
    forwards: list[Tensor] = field(default_factory=list)


@dataclass
class Followed:
    """Counts on this rank: choices that followed the smaller model's, and those that would have been others."""

    total: int = 0
    elsewhere: int = 0


@contextmanager
def recorded(stage: nn.Module) -> Iterator[Mapping[str, Choices]]:
    """The choices of every forward pass inside, by the name of the projection."""
    found: dict[str, Choices] = {}
    projections = _sparse(stage)

    def record(name: str, logits: Tensor, balance: Tensor) -> Tensor:
        chosen = choose(logits, balance)
        found[name].forwards.append(all_gather(chosen, projections[name].group, 1).cpu())
        return chosen

    for name, projection in projections.items():
        found[name] = Choices(projection.bank.shape[1])
        projection.choose = _named(record, name)
    try:
        yield found
    finally:
        _restore(projections)


@contextmanager
def following(stage: nn.Module, choices: Mapping[str, Choices]) -> Iterator[Followed]:
    """Inside, forward passes follow the recorded ones, in their order.

    `choices`: by the projection's name in this model. Slots that the smaller model did not have choose freely.
    """
    followed = Followed()
    projections = {name: projection for name, projection in _sparse(stage).items() if name in choices}
    forwards = {name: iter(choices[name].forwards) for name in projections}

    def follow(name: str, logits: Tensor, balance: Tensor) -> Tensor:
        chosen = choose(logits, balance)
        slots, rank = logits.shape[1], projections[name].group.rank
        originals = next(forwards[name])[:, rank * slots : (rank + 1) * slots].to(logits.device)
        known = originals.shape[1]
        copies = logits.shape[2] // choices[name].candidates
        followed.total += originals.numel()
        followed.elsewhere += int((chosen[:, :known] // copies != originals).sum())
        own = choose_among_copies(logits[:, :known], balance[:known], originals, copies)
        return torch.cat([own, chosen[:, known:]], 1)

    for name, projection in projections.items():
        projection.choose = _named(follow, name)
    try:
        yield followed
    finally:
        _restore(projections)


def _named(function: Callable[[str, Tensor, Tensor], Tensor], name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda logits, balance: function(name, logits, balance)


def _sparse(stage: nn.Module) -> dict[str, SparsePattention]:
    return {name: module for name, module in stage.named_modules() if isinstance(module, SparsePattention)}


def _restore(projections: Mapping[str, SparsePattention]) -> None:
    for projection in projections.values():
        projection.choose = choose
