"""Pairs of rows with the candidates that they chose, and their matrix products.

A slot has m candidates, each a group of g tokens. A *pair* is a row and its choice in one slot. Pairs are sorted by
slot, candidate and row. So the scores of a candidate are contiguous, and its products are matrix products.

| tensor | shape |
|---|---|
| tokens: keys or values of all candidates | [slots, m, g, width] |
| of pairs: scores, their gradient, weights S | [slots · rows, g] |
| of rows: inputs, outputs | [rows, width] |

`pair_steps` has two ways to compute the products: all at once, or piece by piece. A `CandidatePiece` is a candidate
with its rows. fp32 products of a CPU read and add to rows in place, those of other types gather them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tf.model.kernels import native_grouped


class Assignment(NamedTuple):
    """The candidate of each row.

    `candidates`: int64 [rows, slots].
    `rows`: int32 [pairs], the row of each pair.
    `places`: int32 [rows, slots], the places of each row's pairs: the inverse of `rows`.
    `ends`: int32 [slots, m], the end of each candidate's pairs among all pairs.
    """

    candidates: Tensor
    rows: Tensor
    places: Tensor
    ends: Tensor

    @property
    def num_pairs(self) -> int:
        return self.rows.numel()

    def by_row(self, values: Tensor) -> Tensor:
        """A number for each pair: [pairs, 1] -> [rows, slots]."""
        return torch.embedding(values, self.places).squeeze(-1)

    def by_pair(self, values: Tensor) -> Tensor:
        """Numbers for each row, repeated for its pairs: [rows, width] -> [pairs, width]."""
        return values.index_select(0, self.rows)


def assign(candidates: Tensor, num_candidates: int) -> Assignment:
    """The assignment of `candidates`, whole numbers [rows, slots] below `num_candidates`.

    One sort of 32-bit numbers over all slots: PyTorch sorts a few long segments on a GPU as two sorts of everything,
    and each of them in as many kernels as the numbers have bytes.
    """
    slots = candidates.shape[1]
    pairs, groups = candidates.numel(), slots * num_candidates
    numbers = torch.arange(max(pairs, groups), dtype=torch.int32, device=candidates.device)
    # The candidates' numbers among those of all slots. An `out` casts in the same kernel.
    chosen = candidates.new_empty(candidates.shape, dtype=torch.int32)
    chosen = torch.add(candidates, numbers[:groups:num_candidates], out=chosen).view(-1)
    # `order` counts pairs row by row.
    in_order, order = chosen.sort(stable=True)
    ends = torch.searchsorted(in_order, numbers[:groups], right=True, out_int32=True)
    places = torch.empty_like(in_order).scatter_(0, order, numbers[:pairs])
    rows = torch.div(order, slots, rounding_mode="floor", out=chosen)
    return Assignment(candidates, rows, places.view(candidates.shape), ends.view(slots, num_candidates))


@dataclass(frozen=True)
class CandidatePiece:
    """The pairs of one candidate, which has `rows`. They are gathered for ordinary matrix products.

    `pairs`: their range among all pairs.  Tokens are [slots, m, g, width], sources and totals [rows, width]. A `room`
    is scratch memory with the shape of the source or the total.
    """

    rows: Tensor
    pairs: slice
    slot: int
    candidate: int

    def inputs(self, source: Tensor, room: Tensor) -> Tensor:
        """`source` in the form that the other methods take. It may use the memory of `room`."""
        return torch.index_select(source, 0, self.rows, out=room[: len(self.rows)])

    def scores(self, inputs: Tensor, tokens: Tensor, out: Tensor) -> None:
        """Writes the piece's rows of `inputs` · tokensᵀ to `out` [pairs of the piece, g]."""
        torch.mm(inputs, tokens[self.slot, self.candidate].mT, out=out)

    def add_outputs(self, scores: Tensor, tokens: Tensor, total: Tensor, room: Tensor) -> None:
        """Adds scores · tokens to the piece's rows of `total`."""
        total.index_add_(0, self.rows, torch.mm(scores, tokens[self.slot, self.candidate], out=room[: len(self.rows)]))

    def gradients(self, scores: Tensor, inputs: Tensor, out: Tensor) -> None:
        """Writes scoresᵀ · `inputs` into the candidate's part of `out`, which is shaped as the tokens."""
        torch.mm(scores.mT, inputs, out=out[self.slot, self.candidate])


class NativePiece(CandidatePiece):
    """The pairs of one candidate. Native products read rows and add to them in place."""

    def inputs(self, source: Tensor, room: Tensor) -> Tensor:
        return source

    def scores(self, inputs: Tensor, tokens: Tensor, out: Tensor) -> None:
        native_grouped.scores(inputs, self.rows, tokens[self.slot, self.candidate], out)

    def add_outputs(self, scores: Tensor, tokens: Tensor, total: Tensor, room: Tensor) -> None:
        native_grouped.add_outputs(scores, self.rows, tokens[self.slot, self.candidate], total)

    def gradients(self, scores: Tensor, inputs: Tensor, out: Tensor) -> None:
        native_grouped.gradients(scores, self.rows, inputs, out[self.slot, self.candidate])


def pieces(assignment: Assignment, tokens: Tensor) -> Iterator[CandidatePiece]:
    """A piece for each candidate that has rows, for products with `tokens` [slots, m, g, width]."""
    yield from candidate_pieces(assignment, native_grouped.usable(tokens))


def candidate_pieces(assignment: Assignment, native: bool = False) -> Iterator[CandidatePiece]:
    """A piece for each candidate that has rows. `native`: whether those with enough of them are NativePiece."""
    first, candidates = 0, assignment.ends.shape[1]
    for group, last in enumerate(assignment.ends.view(-1).tolist()):
        if last > first:
            kind = NativePiece if native and last - first >= native_grouped.LEAST_ROWS else CandidatePiece
            yield kind(assignment.rows[first:last], slice(first, last), *divmod(group, candidates))
        first = last


def has_grouped_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products of this type go over all candidates at once, with shapes that do not depend on the choices."""
    return device_type == "cuda" and dtype == torch.bfloat16


def empty_gradients(tokens: Tensor, assignment: Assignment) -> Tensor:
    """Memory for the gradients of tokens [slots, m, g, width], 0 for candidates that no row chose."""
    out = torch.empty_like(tokens)
    ends = [0, *assignment.ends.view(-1).tolist()]
    for group, part in enumerate(out.flatten(0, 1)):
        if ends[group] == ends[group + 1]:
            part.zero_()
    return out
