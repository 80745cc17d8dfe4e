"""The matrices of a `MatrixRule`, whose rows are spread over ranks.

A parameter of a block is one matrix, or a stack of matrices of `ParameterSpec.matrix_rows` rows each. A rank has
consecutive rows of it. To transform its rows of D, see `optimizers.base`, the ranks add up, in one all-reduce for all
parameters of a block,

| parameter | fp64 numbers |
|---|---|
| a matrix [n, d] | DᵀD: d² |
| a stack of matrices [g, d] | the rows of those that are cut between ranks, at most one at each boundary: g·d each |

The other matrices of a stack are each whole on a rank, which needs no other for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.optimizers.base import MatrixRule
from megatron_tf.parallel.groups import Group
from megatron_tf.state.parameters import ParameterSpec

# elements of a stack that are in fp64 at the same time: 64 MiB
AT_ONCE = 2**23


class Matrices:
    """The matrices of this rank's blocks.

    `rows`: of each the logical rows [start, stop) that this rank has, by name; without a name it has none.
    `ranks`: those that share the rows. They have the same `specs`, and make this object together.
    """

    def __init__(self, specs: Sequence[ParameterSpec], rows: Mapping[str, range], ranks: Group):
        self.specs = list(specs)
        self._ranks = ranks
        everyone = [dict(rows)] * ranks.size
        if ranks.handle is not None and any(spec.matrix_rows for spec in specs):
            dist.all_gather_object(everyone, dict(rows), group=ranks.handle)
        self._stacks = {
            spec.name: _Stack(spec, [had.get(spec.name, range(0)) for had in everyone], rows.get(spec.name, range(0)))
            for spec in specs
            if spec.matrix_rows
        }

    def transformed(self, rule: MatrixRule, directions: Sequence[tuple[ParameterSpec, Tensor]]) -> list[Tensor]:
        """For each of `directions`, this rank's rows [rows, d] of D, its rows of the update. All ranks call it."""
        stacks = [self._stacks.get(spec.name) for spec, _ in directions]
        sent = [stack.sent(rows) if stack else _gram(rows) for stack, (_, rows) in zip(stacks, directions)]
        if self._ranks.handle is not None:
            flat = torch.cat([each.flatten() for each in sent])
            dist.all_reduce(flat, group=self._ranks.handle)
            sent = [own.view_as(each) for own, each in zip(flat.split([each.numel() for each in sent]), sent)]
        transforms = iter(_transforms(rule, [own for stack, own in zip(stacks, sent) if not stack]))
        return [
            stack.transformed(rule, rows, own) if stack else rows.double() @ next(transforms)
            for stack, (_, rows), own in zip(stacks, directions, sent)
        ]


class _Piece(NamedTuple):
    """A part of a matrix of a stack: its rows among those of the rank, and among those of the matrix."""

    matrix: int
    own: slice
    within: slice


class _Stack:
    """A stack of matrices: `own` are this rank's rows, `everyone` those of each rank."""

    def __init__(self, spec: ParameterSpec, everyone: Sequence[range], own: range):
        self._size, self._width = spec.matrix_rows, spec.width
        self._pieces = _pieces(own, self._size)
        cut = sorted({piece.matrix for rows in everyone for piece in _pieces(rows, self._size)})
        self._places = {matrix: place for place, matrix in enumerate(cut)}
        # the rank's rows that are whole matrices
        self._start = -own.start % self._size
        self._stop = max(self._start, len(own) - own.stop % self._size)

    def sent(self, rows: Tensor) -> Tensor:
        """fp64 [cut matrices, g, d]: this rank's rows of the cut ones, and zeros."""
        found = rows.new_zeros(len(self._places), self._size, self._width, dtype=torch.float64)
        for piece in self._pieces if len(rows) else ():
            found[self._places[piece.matrix], piece.within] = rows[piece.own].double()
        return found

    def transformed(self, rule: MatrixRule, rows: Tensor, cut: Tensor) -> Tensor:
        """This rank's rows of the update. `cut`: what all ranks sent, added up. `rows`: none without a gradient."""
        found = torch.empty_like(rows)
        if not len(rows):
            return found
        step = max(1, AT_ONCE // (self._size * self._width)) * self._size
        for start in range(self._start, self._stop, step):
            part = slice(start, min(start + step, self._stop))
            found[part] = _transformed(rule, rows[part].double().unflatten(0, (-1, self._size))).flatten(0, 1)
        for piece in self._pieces:
            found[piece.own] = _transformed(rule, cut[self._places[piece.matrix]])[piece.within]
        return found


def _pieces(rows: range, size: int) -> list[_Piece]:
    """The parts in `rows` of matrices of `size` rows that are not whole there."""
    found = []
    for matrix in sorted({rows.start // size, (rows.stop - 1) // size} if rows else ()):
        first = matrix * size
        low, high = max(rows.start, first), min(rows.stop, first + size)
        if high - low < size:
            own = slice(low - rows.start, high - rows.start)
            found.append(_Piece(matrix, own, slice(low - first, high - first)))
    return found


def _transformed(rule: MatrixRule, matrices: Tensor) -> Tensor:
    """D·P of whole matrices D, fp64 [..., g, d], by the smaller one of their two Gram matrices."""
    if matrices.shape[-2] < matrices.shape[-1]:
        return rule.transform(matrices @ matrices.mT) @ matrices
    return matrices @ rule.transform(matrices.mT @ matrices)


def _transforms(rule: MatrixRule, grams: Sequence[Tensor]) -> list[Tensor]:
    """`rule.transform` of each of `grams`. All of one width are one call, because a GPU waits between small ones."""
    found: dict[int, Tensor] = {}
    for width in {len(gram) for gram in grams}:
        own = [place for place, gram in enumerate(grams) if len(gram) == width]
        found.update(zip(own, rule.transform(torch.stack([grams[place] for place in own]))))
    return [found[place] for place in range(len(grams))]


def _gram(rows: Tensor) -> Tensor:
    """DᵀD of these rows, [d, d]. It is fp64, because it squares singular values: fp32 would lose small ones."""
    exact = rows.double()
    return exact.mT @ exact
