"""The products of sparse Pattention and the steps between them, with their gradients.

Products of rows with candidates are computed piece by piece, see `grouped`; on a GPU in bf16 all pairs are one piece.
On a CPU the passes over the scores are computed by piece as well, while it is in the cache. On a GPU each pass is one
kernel for all pairs, except the pass that computes D, which is by piece. The pairs of a row depend on each other only
through r and T. These are one number a row and projection, all-reduced over the tensor ranks as in the dense layer, for
all projections that share x at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.activations.function import ScoreFunction, accumulating, score_function
from megatron_tf.model.grouped import Assignment, empty_gradients, pieces
from megatron_tf.model.kernels import score_layout
from megatron_tf.parallel.collectives import begin_all_reduce
from megatron_tf.parallel.groups import Group


class ChosenTokens(NamedTuple):
    """The tokens of one projection, and the choice of each row among them.

    `scale`: τ.  `keys`, `values`: of this rank's slots, [slots/T · m · g, width].  `dense_keys`, `dense_values`: of the
    tokens that every row uses, or None.  `gate`: ones [rows, slots/T], a factor on the weights S of each slot that is
    used for its gradient only.
    """

    assignment: Assignment
    scale: float
    keys: Tensor
    values: Tensor
    dense_keys: Tensor | None
    dense_values: Tensor | None
    gate: Tensor


def sparse_pattention(
    x: Tensor, projections: Sequence[ChosenTokens], activation: str, group: Group
) -> tuple[Tensor, ...]:
    """x [rows, d_in] -> an output [rows, d_out] for each projection, still to be summed over `group`.

    Computed in the type of the tokens; under autocast, in autocast's type.
    """
    device, dtype = x.device.type, projections[0].keys.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    tensors: list[Tensor] = []
    for chosen in projections:
        for tokens in (chosen.keys, chosen.values, chosen.dense_keys, chosen.dense_values):
            tensors.append(x.new_empty(0, 0, dtype=dtype) if tokens is None else tokens.to(dtype))
        tensors.append(chosen.gate)
    choices = [(chosen.assignment, chosen.scale) for chosen in projections]
    with torch.autocast(device, enabled=False):
        return _SparsePattention.apply(score_function(activation), group, choices, x.to(dtype).contiguous(), *tensors)


class _SparsePattention(Function):
    @staticmethod
    def forward(ctx, function, group, choices, x, *tensors):
        parts = [_Projection(function, *choice, *own) for choice, own in zip(choices, _batched(tensors, 5))]
        kept = [part.scores(x) for part in parts]
        r = function.begin_reduction(torch.cat([local for *_, local in kept], -1), group)().split(1, -1)
        states = [(scores, dense, own_r) for (scores, dense, _), own_r in zip(kept, r)]
        orders = [tensor for assignment, _ in choices for tensor in (assignment.order, assignment.ends)]
        ctx.save_for_backward(x, *(tensor for state in states for tensor in state), *orders, *tensors)
        ctx.function, ctx.group, ctx.scales = function, group, [scale for _, scale in choices]
        return tuple(part.outputs(*state) for part, state in zip(parts, states))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        count, grads = len(ctx.scales), [grad.contiguous() for grad in grads]
        states, orders, tensors = saved[: 3 * count], saved[3 * count : 5 * count], saved[5 * count :]
        works = [
            _Backward(_Projection(ctx.function, Assignment(*order), scale, *own), *state)
            for scale, state, order, own in zip(
                ctx.scales, _batched(states, 3), _batched(orders, 2), _batched(tensors, 5)
            )
        ]
        finish = begin_all_reduce(torch.cat([work.to_weights(grad) for work, grad in zip(works, grads)], -1), ctx.group)
        for work, grad in zip(works, grads):  # hides the all-reduce of T
            work.to_dense_values(grad)
        d_x = torch.zeros_like(x)
        for work, total in zip(works, finish().split(1, -1)):
            work.to_keys_and_inputs(x, total, d_x)
        return None, None, None, d_x, *(gradient for work in works for gradient in work.gradients())


def _batched(tensors: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [tensors[start : start + size] for start in range(0, len(tensors), size)]


class _Projection:
    """The forward pass of one projection, and its tensors, which the backward pass uses as well."""

    def __init__(
        self,
        function: ScoreFunction,
        assignment: Assignment,
        scale: float,
        keys: Tensor,
        values: Tensor,
        dense_keys: Tensor,
        dense_values: Tensor,
        gate: Tensor,
    ):
        self.function, self.assignment, self.scale, self.gate = function, assignment, scale, gate
        self.keys, self.values = (tokens.view(*assignment.ends.shape, -1, tokens.shape[1]) for tokens in (keys, values))
        self.dense_keys, self.dense_values = dense_keys, dense_values

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(scores of the pairs, scores of the dense tokens, this rank's statistic of each row [rows, 1])."""
        assignment, room = self.assignment, torch.empty_like(x)
        scores = x.new_empty(assignment.num_pairs, self.keys.shape[2])
        statistics = scores.new_empty(assignment.num_pairs, 1, dtype=accumulating(scores))
        for piece in pieces(assignment, self.keys):
            own = scores[piece.pairs]
            piece.scores(piece.inputs(x, room), self.keys, own)
            if not x.is_cuda:
                statistics[piece.pairs] = self.function.statistic(own)
        if x.is_cuda:
            statistics = self.function.statistic(scores)
        parts = [assignment.by_row(statistics)]
        dense = score_layout.empty_scores(x, len(x), len(self.dense_keys))
        if len(self.dense_keys):
            dense.addmm_(x, self.dense_keys.mT, beta=0)
            parts.append(self.function.statistic(dense))
        return scores, dense, self.function.combine(torch.cat(parts, -1))

    def outputs(self, scores: Tensor, dense: Tensor, r: Tensor) -> Tensor:
        if len(self.dense_keys):
            out = self.function.weights(dense, r, self.scale) @ self.dense_values
        else:
            out = scores.new_zeros(len(r), self.values.shape[3])
        of_pairs, room = self.assignment.by_pair(r), torch.empty_like(out)
        s = self.function.weights(scores, of_pairs, self.scale) if scores.is_cuda else None
        for piece in pieces(self.assignment, self.values):
            part = piece.pairs
            own = self.function.weights(scores[part], of_pairs[part], self.scale) if s is None else s[part]
            piece.add_outputs(own, self.values, out, room)
        return out


class _Backward:
    """The backward pass of one projection. D and then dA overwrite dS."""

    def __init__(self, projection: _Projection, scores: Tensor, dense: Tensor, r: Tensor):
        self.projection = projection
        self.scores, self.dense, self.r, self.of_pairs = scores, dense, r, projection.assignment.by_pair(r)
        self.d, self.d_dense = torch.empty_like(scores), score_layout.empty_scores(dense, *dense.shape)
        self.key_grads, self.value_grads = (
            empty_gradients(tokens, projection.assignment) for tokens in (projection.keys, projection.values)
        )
        self.dense_key_grads: Tensor | None = None
        self.dense_value_grads: Tensor | None = None

    def to_weights(self, grad: Tensor) -> Tensor:
        """Computes D, and the gradients of gate and values in slots. Returns this rank's T of each row [rows, 1]."""
        own, function, scale = self.projection, self.projection.function, self.projection.scale
        totals, room = torch.empty_like(self.of_pairs), torch.empty_like(grad)
        self.gate_grads = torch.empty_like(self.of_pairs)
        for piece in pieces(own.assignment, own.values):
            part, d, own_grad = piece.pairs, self.d[piece.pairs], piece.inputs(grad, room)
            piece.scores(own_grad, own.values, d)
            s, totals[part], self.gate_grads[part] = function.backward_with_product(
                self.scores[part], self.of_pairs[part], d, scale
            )
            piece.gradients(s, own_grad, self.value_grads)
        total = own.assignment.by_row(totals).sum(-1, keepdim=True)
        if len(own.dense_keys):
            self.d_dense.addmm_(grad, own.dense_values.mT, beta=0)
            self.s_dense, dense_total = function.backward(self.dense, self.r, self.d_dense, scale)
            total += dense_total
        return total

    def to_dense_values(self, grad: Tensor) -> None:
        """Computes the gradient of the dense values, which does not depend on T."""
        if len(self.projection.dense_keys):
            self.dense_value_grads = self.s_dense.mT @ grad

    def to_keys_and_inputs(self, x: Tensor, total: Tensor, d_x: Tensor) -> None:
        """Computes the gradients of the keys with `total`, T over all ranks, and adds the gradient of x to `d_x`."""
        own, function, scale = self.projection, self.projection.function, self.projection.scale
        if len(own.dense_keys):
            function.couple(self.dense, self.r, total, self.d_dense, scale)
            self.dense_key_grads = self.d_dense.mT @ x
            d_x.addmm_(self.d_dense, own.dense_keys)
        of_pairs, inputs, room = own.assignment.by_pair(total), torch.empty_like(x), torch.empty_like(x)
        if x.is_cuda:
            function.couple(self.scores, self.of_pairs, of_pairs, self.d, scale)
        for piece in pieces(own.assignment, own.keys):
            part, d = piece.pairs, self.d[piece.pairs]
            if not x.is_cuda:
                function.couple(self.scores[part], self.of_pairs[part], of_pairs[part], d, scale)
            piece.gradients(d, piece.inputs(x, inputs), self.key_grads)
            piece.add_outputs(d, own.keys, d_x, room)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """The gradients of keys, values, dense keys, dense values and gate."""
        gate = self.projection.assignment.by_row(self.gate_grads).to(self.projection.gate.dtype)
        bank = (tokens.flatten(0, 2) for tokens in (self.key_grads, self.value_grads))
        return *bank, self.dense_key_grads, self.dense_value_grads, gate
