"""Batches of examples, packed into sequences. The order is a function of the seed and the step.

| tensor | shape | content |
|---|---|---|
| input_ids | [b, s] | tokens, padded with 0 |
| targets | [b, s] | the next token of the same example if it is to be learnt, else −100 |
| position_ids | [b, s] | counted from 0 at the first token of each example |
| attention_mask | [b, s] | 1; 0 for padding. Only without packing |
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_tf.finetuning.examples import Example

IGNORED = -100
_OPEN = 64  # sequences that are still being filled

Row = Sequence[Example]


@dataclass(frozen=True)
class Batch:
    """See the table above."""

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None


def pack(examples: Sequence[Example], seq_length: int, seed: int) -> list[Row]:
    """Rows of at most `seq_length` tokens. Each example, in random order, goes whole into the fullest row with room."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    done: list[list[Example]] = []
    rows: list[tuple[int, list[Example]]] = []
    for example in order:
        size = len(example.ids)
        fitting = [row for row in rows if row[0] + size <= seq_length]
        chosen = max(fitting, key=lambda row: row[0], default=(0, []))
        rows = [row for row in rows if row is not chosen]
        rows.append((chosen[0] + size, [*chosen[1], example]))
        if len(rows) > _OPEN:
            fullest = max(rows, key=lambda row: row[0])
            rows = [row for row in rows if row is not fullest]
            done.append(fullest[1])
    return [*done, *(row for _, row in rows)]


def rows_from(rows: Sequence[Row], first: int, count: int, seed: int) -> list[Row]:
    """`count` rows, from number `first` on of all epochs. Each epoch has all rows once, in an order of its own."""
    found = []
    for position in range(first, first + count):
        epoch, place = divmod(position, len(rows))
        found.append(rows[_order(len(rows), seed, epoch)[place]])
    return found


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Sequence[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def count_targets(rows: Sequence[Row]) -> int:
    return sum(sum(example.learnt) for row in rows for example in row)


def collate(rows: Sequence[Row], length: int | None) -> Batch:
    """The batch of packed `rows`, each padded to `length` tokens. `length` None: rows have one example each, and are
    padded to the longest."""
    longest = length or max(len(example.ids) for row in rows for example in row)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    targets = torch.full_like(ids, IGNORED)
    positions = torch.zeros_like(ids)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        start = 0
        for example in row:
            stop = start + len(example.ids)
            tokens = torch.tensor(example.ids)
            ids[number, start:stop] = tokens
            positions[number, start:stop] = torch.arange(stop - start)
            mask[number, start:stop] = 1
            learnt = torch.tensor(example.learnt[1:], dtype=torch.bool)
            targets[number, start : stop - 1] = torch.where(learnt, tokens[1:], IGNORED)
            start = stop
        # positions begin anew in the padding, so that attention sees an example of its own in it
        positions[number, start:] = torch.arange(longest - start)
    return Batch(ids, targets, positions, None if length else mask)
