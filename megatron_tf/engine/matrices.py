"""The matrices of a `MatrixRule`, whose rows are spread over ranks.

A parameter of a block is one matrix, or a stack of matrices of `ParameterSpec.matrix_rows` rows each. A rank has
consecutive rows of it. For its rows of the update, see `optimizers.base`, ranks add up, in one all-reduce for all
parameters of a block,

| matrices | fp64 numbers |
|---|---|
| one [n, d] with n ≥ d | DᵀD: d² |
| one with fewer rows, or a stack of [g, d] | the rows of those that ranks share, at most one a boundary: g·d |

By DᵀD each rank transforms its rows of the first. Of the second it updates whole matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.model.products import add_products
from megatron_tf.optimizers.base import MatrixRule
from megatron_tf.parallel.groups import Group
from megatron_tf.state.parameters import ParameterSpec

# Elements of a stack that are updated at the same time, on a CPU by each thread. There they stay in the core's cache,
# which is 1.5 times as fast.
AT_ONCE = {"cpu": 2**18, "cuda": 2**23}


class Matrices:
    """The matrices of this rank's blocks.

    `rows`: of each the logical rows [start, stop) that this rank has, by name; without a name it has none.
    `ranks`: those that share the rows. They have the same `specs`, and make this object together.
    """

    def __init__(self, specs: Sequence[ParameterSpec], rows: Mapping[str, range], ranks: Group):
        self.specs = list(specs)
        self._ranks = ranks
        stacks = [spec for spec in specs if spec.matrix_rows or spec.shape[0] < spec.width]
        everyone = [dict(rows)] * ranks.size
        if ranks.handle is not None and stacks:
            dist.all_gather_object(everyone, dict(rows), group=ranks.handle)
        self._stacks = {
            spec.name: _Stack(spec, [had.get(spec.name, range(0)) for had in everyone], rows.get(spec.name, range(0)))
            for spec in stacks
        }

    def transformed(self, rule: MatrixRule, directions: Sequence[tuple[ParameterSpec, Tensor]]) -> list[Tensor]:
        """For each of `directions`, this rank's rows [rows, d] of D, its rows of the update. All ranks call it.

        A rank that has no gradient gives no rows.
        """
        stacks = {place: own for place, (spec, _) in enumerate(directions) if (own := self._stacks.get(spec.name))}
        sent = [
            stacks[place].sent(rows) if place in stacks else _gram(rows) for place, (_, rows) in enumerate(directions)
        ]
        if self._ranks.handle is not None:
            flat = torch.cat([each.flatten() for each in sent])
            dist.all_reduce(flat, group=self._ranks.handle)
            sent = [own.view_as(each) for own, each in zip(flat.split([each.numel() for each in sent]), sent)]
        found = [rows for _, rows in directions]
        of_one = [place for place, rows in enumerate(found) if len(rows) and place not in stacks]
        for place, transform in zip(of_one, _alike(rule.transform, [sent[place] for place in of_one])):
            found[place] = found[place].double() @ transform
        of_stacks = {
            place: own.matrices(found[place], sent[place]) for place, own in stacks.items() if len(found[place])
        }
        for place, matrices in zip(of_stacks, _alike(lambda stack: _updates(rule, stack), list(of_stacks.values()))):
            found[place] = stacks[place].rows(matrices)
        return found


class _Piece(NamedTuple):
    """A part of a matrix of a stack: its rows among those of the rank, and among those of the matrix."""

    matrix: int
    own: slice
    within: slice


class _Stack:
    """A stack of matrices: `own` are this rank's rows, `everyone` those of each rank."""

    def __init__(self, spec: ParameterSpec, everyone: Sequence[range], own: range):
        self._size, self._width = spec.matrix_rows or spec.shape[0], spec.width
        self._count = len(own)
        self._pieces = _pieces(own, self._size)
        cut = sorted({piece.matrix for rows in everyone for piece in _pieces(rows, self._size)})
        self._places = {matrix: place for place, matrix in enumerate(cut)}
        # this rank's rows that are whole matrices
        start = -own.start % self._size
        self._whole = slice(start, max(start, len(own) - own.stop % self._size))

    def sent(self, rows: Tensor) -> Tensor:
        """fp64 [cut matrices, g, d]: this rank's rows of the cut ones, and zeros."""
        found = rows.new_zeros(len(self._places), self._size, self._width, dtype=torch.float64)
        for piece in self._pieces if len(rows) else ():
            found[self._places[piece.matrix], piece.within] = rows[piece.own].double()
        return found

    def matrices(self, rows: Tensor, cut: Tensor) -> Tensor:
        """[matrices, g, d]: those that are whole among `rows`, then those that are cut. `cut`: of all ranks' `sent`."""
        parts = [cut[self._places[piece.matrix]].to(rows.dtype) for piece in self._pieces]
        whole = rows[self._whole].view(-1, self._size, self._width)
        return torch.cat([whole, torch.stack(parts)]) if parts else whole

    def rows(self, matrices: Tensor) -> Tensor:
        """This rank's rows [rows, d] of such matrices."""
        if not self._pieces:
            return matrices.flatten(0, 1)
        whole = matrices[: len(matrices) - len(self._pieces)].flatten(0, 1)
        found = whole.new_empty(self._count, self._width)
        found[self._whole] = whole
        for piece, matrix in zip(self._pieces, matrices[len(matrices) - len(self._pieces) :]):
            found[piece.own] = matrix[piece.within]
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


def _updates(rule: MatrixRule, matrices: Tensor) -> Tensor:
    """D·P of each of `matrices` D [matrices, g, d]."""
    found, kind = torch.empty_like(matrices), matrices.device.type
    elements = AT_ONCE[kind] * (torch.get_num_threads() if kind == "cpu" else 1)
    most = max(1, elements // matrices[0].numel())
    for part, target in zip(matrices.split(most), found.split(most)):
        target.copy_(rule.update_whole(part, add_products))
    return found


def _alike(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """`function` of each of `tensors`, of square matrices or of stacks of matrices.

    All of one shape are one call, because a GPU waits between small ones.
    """
    found: dict[int, Tensor] = {}
    for shape in {tensor.shape[-2:] for tensor in tensors}:
        own = [place for place, tensor in enumerate(tensors) if tensor.shape[-2:] == shape]
        stacks = [tensors[place].view(-1, *shape) for place in own]
        parts = function(torch.cat(stacks)).split([len(stack) for stack in stacks])
        found.update((place, part.view_as(tensors[place])) for place, part in zip(own, parts))
    return [found[place] for place in range(len(tensors))]


def _gram(rows: Tensor) -> Tensor:
    """DᵀD of these rows, [d, d]. It is fp64, because it squares singular values: fp32 would lose small ones."""
    exact = rows.double()
    return exact.mT @ exact
