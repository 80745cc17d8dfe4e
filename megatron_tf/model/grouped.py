"""Matrix products of rows with the tokens of the candidates that they chose.

A slot has m candidates, each a group of g tokens. A *pair* is a row and its choice in one slot. Pairs are sorted by
slot, candidate and row. So the scores of a candidate are contiguous, and its products are matrix products.

| tensor | shape |
|---|---|
| tokens: keys or values of all candidates | [slots, m, g, width] |
| of pairs: scores, their gradient, weights S | [slots · rows, g] |
| of rows: inputs, outputs | [rows, width] |

Pairs are processed in pieces. On a CPU a piece is a candidate with its rows, which stay in the cache between products;
fp32 products read and add to rows in place, those of other types gather them. On a GPU there is one piece, all pairs,
and one grouped product. It reads its sizes on the device, so nothing waits for the host, and shapes do not depend on
the choices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.model.kernels import native_grouped


@dataclass(frozen=True)
class Assignment:
    """The candidate of each row.

    `order`: int64 [slots, rows], the row of each pair.
    `ends`: int32 [slots, m], the end of each candidate's pairs among those of its slot.
    """

    order: Tensor
    ends: Tensor

    @property
    def num_pairs(self) -> int:
        return self.order.numel()

    def by_row(self, values: Tensor) -> Tensor:
        """A number for each pair: [pairs, 1] -> [rows, slots]."""
        out = values.new_empty(self.order.shape)
        return out.scatter_(1, self.order, values.view(self.order.shape)).mT

    def by_pair(self, values: Tensor) -> Tensor:
        """A number for each row, repeated for its pairs: [rows, 1] -> [pairs, 1]."""
        return values[self.order.flatten()]

    def pairs_of_rows(self) -> Tensor:
        """int64 [rows, slots]: the places of each row's pairs."""
        places = torch.arange(self.num_pairs, device=self.order.device).view(self.order.shape)
        return torch.empty_like(self.order).scatter_(1, self.order, places).mT

    def ends_among_all(self) -> Tensor:
        """int32 [slots · m]: the end of each candidate's pairs among all pairs."""
        slots, rows = self.order.shape
        starts = rows * torch.arange(slots, dtype=torch.int32, device=self.ends.device)
        return (self.ends + starts.unsqueeze(1)).flatten()


def assign(candidates: Tensor, num_candidates: int) -> Assignment:
    """The assignment of `candidates`, whole numbers [rows, slots] below `num_candidates`."""
    by_slot = candidates.mT.contiguous()
    counts = torch.zeros(by_slot.shape[0], num_candidates, dtype=torch.int32, device=candidates.device)
    counts.scatter_add_(1, by_slot, torch.ones_like(by_slot, dtype=torch.int32))
    order = by_slot.argsort(dim=1, stable=True)
    return Assignment(order, counts.cumsum(1, dtype=torch.int32))


class Piece(ABC):
    """Pairs that are processed together.

    `pairs`: their range among all pairs.  Tokens are [slots, m, g, width], sources and totals [rows, width]. A `room`
    is scratch memory with the shape of the source or the total.
    """

    pairs: slice

    @abstractmethod
    def inputs(self, source: Tensor, room: Tensor) -> Tensor:
        """`source` in the form that the other methods take. It may use the memory of `room`."""

    @abstractmethod
    def scores(self, inputs: Tensor, tokens: Tensor, out: Tensor) -> None:
        """Writes the piece's rows of `inputs` · tokensᵀ to `out` [pairs of the piece, g]."""

    @abstractmethod
    def add_outputs(self, scores: Tensor, tokens: Tensor, total: Tensor, room: Tensor) -> None:
        """Adds scores · tokens to the piece's rows of `total`."""

    @abstractmethod
    def gradients(self, scores: Tensor, inputs: Tensor, out: Tensor) -> None:
        """Writes scoresᵀ · `inputs` of each candidate into its part of `out`, which is shaped as the tokens."""


@dataclass(frozen=True)
class CandidatePiece(Piece):
    """The pairs of one candidate, which has `rows`. They are gathered for ordinary matrix products."""

    rows: Tensor
    pairs: slice
    slot: int
    candidate: int

    def inputs(self, source: Tensor, room: Tensor) -> Tensor:
        return torch.index_select(source, 0, self.rows, out=room[: len(self.rows)])

    def scores(self, inputs: Tensor, tokens: Tensor, out: Tensor) -> None:
        torch.mm(inputs, tokens[self.slot, self.candidate].mT, out=out)

    def add_outputs(self, scores: Tensor, tokens: Tensor, total: Tensor, room: Tensor) -> None:
        total.index_add_(0, self.rows, torch.mm(scores, tokens[self.slot, self.candidate], out=room[: len(self.rows)]))

    def gradients(self, scores: Tensor, inputs: Tensor, out: Tensor) -> None:
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


@dataclass(frozen=True)
class AllPairs(Piece):
    """The pairs of all candidates, whose ends are `ends`. No shape depends on how many pairs each candidate has."""

    pairs: slice
    assignment: Assignment
    ends: Tensor

    def inputs(self, source: Tensor, room: Tensor) -> Tensor:
        return source.index_select(0, self.assignment.order.flatten())

    def scores(self, inputs: Tensor, tokens: Tensor, out: Tensor) -> None:
        out.copy_(F.grouped_mm(inputs, tokens.flatten(0, 1).mT, offs=self.ends))

    def add_outputs(self, scores: Tensor, tokens: Tensor, total: Tensor, room: Tensor) -> None:
        products = F.grouped_mm(scores, tokens.flatten(0, 1), offs=self.ends)
        # A sum over the slots without atomic additions, accumulated in fp32.
        total += F.embedding_bag(self.assignment.pairs_of_rows(), products, mode="sum")

    def gradients(self, scores: Tensor, inputs: Tensor, out: Tensor) -> None:
        out.copy_(F.grouped_mm(scores.mT, inputs, offs=self.ends).view(out.shape))


def pieces(assignment: Assignment, tokens: Tensor) -> Iterator[Piece]:
    """All pairs in pieces, for products with `tokens`."""
    if has_grouped_products(tokens):
        yield AllPairs(slice(0, assignment.num_pairs), assignment, assignment.ends_among_all())
        return
    yield from candidate_pieces(assignment, native_grouped.usable(tokens))


def candidate_pieces(assignment: Assignment, native: bool = False) -> Iterator[CandidatePiece]:
    """A piece for each candidate that has rows. `native`: whether those with enough of them are NativePiece."""
    num_rows = assignment.order.shape[1]
    for slot, (rows, ends) in enumerate(zip(assignment.order, assignment.ends)):
        first = 0
        for candidate, last in enumerate(ends.tolist()):
            if last > first:
                kind = NativePiece if native and last - first >= native_grouped.LEAST_ROWS else CandidatePiece
                start = slot * num_rows
                yield kind(rows[first:last], slice(start + first, start + last), slot, candidate)
            first = last


def has_grouped_products(tokens: Tensor) -> bool:
    """Whether products with `tokens` go over all candidates at once."""
    return tokens.is_cuda and tokens.dtype == torch.bfloat16


def empty_gradients(tokens: Tensor, assignment: Assignment) -> Tensor:
    """Memory for the gradients of tokens [slots, m, g, width], 0 for candidates that no row chose."""
    if tokens.is_cuda:
        return torch.zeros_like(tokens)
    out = torch.empty_like(tokens)
    unused = assignment.ends.diff(dim=1, prepend=assignment.ends.new_zeros(len(out), 1)) == 0
    for slot, candidate in unused.nonzero().tolist():
        out[slot, candidate] = 0
    return out
