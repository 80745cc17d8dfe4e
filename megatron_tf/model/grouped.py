"""Rows that use one of several candidates, and their products with the tokens of theirs.

A slot has m candidates, each a group of g tokens. A *pair* is a row and its choice in one slot. Pairs lie sorted: by
slot, by candidate, and rows of one candidate in their own order. So the scores of a candidate are neighbours, and its
products are products of matrices.

| tensor | shape |
|---|---|
| tokens: keys or values of all candidates | [slots, m, g, width] |
| of pairs: scores, their gradient, weights S | [slots · rows, g] |
| of rows: inputs, outputs | [rows, width] |

Work goes over the pairs piece by piece. On a CPU a piece is a candidate with its rows, which the cache holds from one
product to the next; products in fp32 read rows and add to them where they lie, those of other types gather them. On a
GPU it is a slot, whose products are one grouped product; its sizes are read on the device, so nothing waits for the
host, and shapes are the same whatever was chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_tf.model.kernels import native_grouped


@dataclass(frozen=True)
class Assignment:
    """Which rows use which candidate.

    `order`: int64 [slots, rows], the row of each pair.
    `ends`: int32 [slots, m], where among the pairs of a slot those of each candidate end.
    """

    order: Tensor
    ends: Tensor

    @property
    def num_pairs(self) -> int:
        return self.order.numel()

    def by_row(self, values: Tensor) -> Tensor:
        """A number a pair, [pairs, 1] -> [rows, slots]."""
        out = values.new_empty(self.order.shape)
        return out.scatter_(1, self.order, values.view(self.order.shape)).mT

    def by_pair(self, values: Tensor) -> Tensor:
        """A number a row, [rows, 1] -> [pairs, 1]."""
        return values[self.order.flatten()]


def assign(candidates: Tensor, num_candidates: int) -> Assignment:
    """The assignment of `candidates`, whole numbers [rows, slots] below `num_candidates`."""
    by_slot = candidates.mT.contiguous()
    counts = torch.zeros(by_slot.shape[0], num_candidates, dtype=torch.int32, device=candidates.device)
    counts.scatter_add_(1, by_slot, torch.ones_like(by_slot, dtype=torch.int32))
    order = by_slot.argsort(dim=1, stable=True)
    return Assignment(order, counts.cumsum(1, dtype=torch.int32))


@dataclass(frozen=True)
class Piece:
    """Pairs that are worked on together: their `rows`, and where they lie among all pairs.

    `slot`: theirs.  `candidate`: theirs, or None for those of the whole slot, which end at `ends`.  `native`: whether
    its products are those of `kernels.native_grouped`.
    """

    rows: Tensor
    pairs: slice
    slot: int
    candidate: int | None
    ends: Tensor
    native: bool

    def inputs(self, source: Tensor, room: Tensor) -> Tensor:
        """`source` [rows, width] as products take it: itself, or in `room`, which is shaped alike, the piece's rows."""
        if self.native:
            return source
        return torch.index_select(source, 0, self.rows, out=room[: len(self.rows)])

    def scores(self, inputs: Tensor, tokens: Tensor, out: Tensor) -> None:
        """Writes the piece's rows of `inputs` · tokensᵀ to `out` [pairs of the piece, g]."""
        if self.candidate is None:
            out.copy_(F.grouped_mm(inputs, tokens[self.slot].mT, offs=self.ends))
        elif self.native:
            native_grouped.scores(inputs, self.rows, tokens[self.slot, self.candidate], out)
        else:
            torch.mm(inputs, tokens[self.slot, self.candidate].mT, out=out)

    def add_outputs(self, scores: Tensor, tokens: Tensor, total: Tensor, room: Tensor) -> None:
        """Adds scores · tokens to the piece's rows of `total` [rows, width]. `room`: shaped alike, for the product."""
        if self.native:
            native_grouped.add_outputs(scores, self.rows, tokens[self.slot, self.candidate], total)
            return
        if self.candidate is None:
            product = F.grouped_mm(scores, tokens[self.slot], offs=self.ends)
        else:
            product = torch.mm(scores, tokens[self.slot, self.candidate], out=room[: len(self.rows)])
        total.index_add_(0, self.rows, product)

    def gradients(self, scores: Tensor, inputs: Tensor, out: Tensor) -> None:
        """Writes scoresᵀ · `inputs` of each candidate into its part of `out`, which is shaped as the tokens."""
        if self.candidate is None:
            out[self.slot] = F.grouped_mm(scores.mT, inputs, offs=self.ends)
        elif self.native:
            native_grouped.gradients(scores, self.rows, inputs, out[self.slot, self.candidate])
        else:
            torch.mm(scores.mT, inputs, out=out[self.slot, self.candidate])


def pieces(assignment: Assignment, tokens: Tensor) -> Iterator[Piece]:
    """All pieces, of products with `tokens`. A candidate without rows is in none of its own."""
    whole_slots, native = tokens.is_cuda and tokens.dtype == torch.bfloat16, native_grouped.usable(tokens)
    num_rows = assignment.order.shape[1]
    for slot, (rows, ends) in enumerate(zip(assignment.order, assignment.ends)):
        start = slot * num_rows
        if whole_slots:
            yield Piece(rows, slice(start, start + num_rows), slot, None, ends, False)
            continue
        first = 0
        for candidate, last in enumerate(ends.tolist()):
            if last > first:
                own, enough = slice(start + first, start + last), last - first >= native_grouped.LEAST_ROWS
                yield Piece(rows[first:last], own, slot, candidate, ends, native and enough)
            first = last


def empty_gradients(tokens: Tensor, assignment: Assignment) -> Tensor:
    """Room for the gradients of tokens [slots, m, g, width], 0 for candidates that nobody chose."""
    if tokens.is_cuda:
        return torch.zeros_like(tokens)
    out = torch.empty_like(tokens)
    unused = assignment.ends.diff(dim=1, prepend=assignment.ends.new_zeros(len(out), 1)) == 0
    for slot, candidate in unused.nonzero().tolist():
        out[slot, candidate] = 0
    return out
