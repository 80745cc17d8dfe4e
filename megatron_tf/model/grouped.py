"""Pairs of rows with the candidates that they chose, and their matrix products.

A slot has m candidates, each a group of g tokens. A *pair* is a row and its choice in one slot. Pairs are sorted by
slot, candidate and row. So the scores of a candidate are contiguous, and its products are matrix products.

| tensor | shape |
|---|---|
| tokens: keys or values of all candidates | [slots, m, g, width] |
| of pairs: scores, their gradient, weights S | [slots · rows, g] |
| of rows: inputs, outputs | [rows, width] |

`pair_steps` has two ways to compute the products: all at once, or piece by piece. A `CandidatePiece` is a candidate
with its rows, which are gathered. fp32 products of a CPU read and add to rows in place: a `NativePiece` is as many
candidates as have scores that fit into the cache together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tf.model.kernels import native_grouped

# Most scores of a `NativePiece` with several candidates, so that they stay in the cache between products and passes.
SCORES_AT_ONCE = 2**18


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

    def spans(self) -> list[tuple[int, int]]:
        """The pairs [first, last) of each candidate, of all slots one after another. Waits for the device."""
        ends = self.ends.view(-1).tolist()
        return list(zip((0, *ends), ends))

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
        """Adds scores · tokens to the piece's rows of `total`, which may be of a wider type."""
        own = torch.mm(scores, tokens[self.slot, self.candidate], out=room[: len(self.rows)])
        total.index_add_(0, self.rows, own.to(total.dtype))

    def gradients(self, scores: Tensor, inputs: Tensor, out: Tensor) -> None:
        """Writes scoresᵀ · `inputs` into the candidate's part of `out`, which is shaped as the tokens."""
        torch.mm(scores.mT, inputs, out=out[self.slot, self.candidate])


@dataclass(frozen=True)
class NativePiece:
    """The pairs of consecutive candidates, with the same methods. Native products read rows and add to them in place.

    `candidates`: their range among those of all slots.
    """

    rows: native_grouped.Rows
    pairs: slice
    candidates: slice

    def inputs(self, source: Tensor, room: Tensor) -> Tensor:
        return source

    def scores(self, inputs: Tensor, tokens: Tensor, out: Tensor) -> None:
        native_grouped.scores(inputs, self.rows, self._own(tokens), out)

    def add_outputs(self, scores: Tensor, tokens: Tensor, total: Tensor, room: Tensor) -> None:
        native_grouped.add_outputs(scores, self.rows, self._own(tokens), total)

    def gradients(self, scores: Tensor, inputs: Tensor, out: Tensor) -> None:
        native_grouped.gradients(scores, self.rows, inputs, self._own(out))

    def _own(self, tokens: Tensor) -> Tensor:
        return tokens.view(-1, *tokens.shape[2:])[self.candidates]


def pieces(assignment: Assignment, tokens: Tensor) -> Iterator[CandidatePiece | NativePiece]:
    """Pieces of all pairs, for products with `tokens` [slots, m, g, width]."""
    if not native_grouped.usable(tokens):
        yield from candidate_pieces(assignment)
        return
    spans, (size, width) = assignment.spans(), tokens.shape[2:]
    least = native_grouped.least_rows(size, width)
    for candidates in _runs(spans, least, max(1, SCORES_AT_ONCE // size)):
        begin, end = spans[candidates.start][0], spans[candidates.stop - 1][1]
        if end - begin < least:
            yield from _of_candidates(assignment, spans, candidates)
        else:
            rows = native_grouped.Rows(assignment.rows[begin:end], assignment.ends.view(-1)[candidates], begin)
            yield NativePiece(rows, slice(begin, end), candidates)


def candidate_pieces(assignment: Assignment) -> Iterator[CandidatePiece]:
    """A piece for each candidate that has rows."""
    spans = assignment.spans()
    yield from _of_candidates(assignment, spans, slice(0, len(spans)))


def _of_candidates(
    assignment: Assignment, spans: Sequence[tuple[int, int]], candidates: slice
) -> Iterator[CandidatePiece]:
    for candidate, (first, last) in enumerate(spans[candidates], candidates.start):
        if last > first:
            place = divmod(candidate, assignment.ends.shape[1])
            yield CandidatePiece(assignment.rows[first:last], slice(first, last), *place)


def _runs(spans: Sequence[tuple[int, int]], least: int, most: int) -> Iterator[slice]:
    """Consecutive candidates with at most `most` pairs, unless one has more.

    A candidate that has pairs, but fewer than `least`, is alone.
    """
    start = 0
    for candidate, (first, last) in enumerate(spans):
        few = 0 < last - first < least
        if candidate > start and (few or last - spans[start][0] > most):
            yield slice(start, candidate)
            start = candidate
        if few:
            yield slice(candidate, candidate + 1)
            start = candidate + 1
    if start < len(spans):
        yield slice(start, len(spans))


def has_grouped_products(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products of this type go over all candidates at once, with shapes that do not depend on the choices."""
    return device_type == "cuda" and dtype == torch.bfloat16


def empty_gradients(tokens: Tensor, assignment: Assignment) -> Tensor:
    """Memory for the gradients of tokens [slots, m, g, width], 0 for candidates that no row chose."""
    out = torch.empty_like(tokens)
    of_candidates = out.flatten(0, 1)
    for candidate, (first, last) in enumerate(assignment.spans()):
        if first == last:
            of_candidates[candidate].zero_()
    return out
