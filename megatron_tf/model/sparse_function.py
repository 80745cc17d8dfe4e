"""Sparse Pattention of projections that share x, with its gradients.

`pair_steps` has what is done for pairs of rows and candidates. Here it meets the tokens that every row uses, the
exchange over the tensor ranks, and the gate. r and T are one number a row and projection. They are all-reduced as in
the dense layer, for all projections that share x at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.activations.function import ScoreFunction, score_function
from megatron_tf.model.grouped import Assignment, has_grouped_products
from megatron_tf.model.pair_steps import AtOnce, ByCandidate, PairSteps
from megatron_tf.model.products import PLAIN, add_product, multiply
from megatron_tf.model.routing import gate_gradient, of_chosen
from megatron_tf.parallel.collectives import begin_all_reduce
from megatron_tf.parallel.groups import Group


class ChosenTokens(NamedTuple):
    """The tokens of one projection, and the choice of each row among them.

    `scale`: τ.  `keys`, `values`: of this rank's slots, [slots/T · m · g, width].  `dense_keys`, `dense_values`: of the
    tokens that every row uses, or None.  `logits`: z [rows, slots/T, m]. The gate of the chosen ones is 1, and they get
    the gradient of `routing.straight_through` as a factor on the weights S of the slot.
    """

    assignment: Assignment
    scale: float
    keys: Tensor
    values: Tensor
    dense_keys: Tensor | None
    dense_values: Tensor | None
    logits: Tensor


def sparse_pattention(
    x: Tensor, projections: Sequence[ChosenTokens], activation: str, group: Group
) -> tuple[Tensor, ...]:
    """x [rows, d_in] -> an output [rows, d_out] for each projection, still to be summed over `group`.

    Computed in the type of the tokens; under autocast, in autocast's type.
    """
    device, dtype = x.device.type, projections[0].keys.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    tensors: list[Tensor | None] = []
    for chosen in projections:
        for tokens in (chosen.keys, chosen.values, chosen.dense_keys, chosen.dense_values):
            tensors.append(None if tokens is None else tokens.to(dtype))
        tensors.append(chosen.logits)
    choices = [(chosen.assignment, chosen.scale) for chosen in projections]
    with torch.autocast(device, enabled=False):
        return _SparsePattention.apply(score_function(activation), group, choices, x.to(dtype).contiguous(), *tensors)


class _SparsePattention(Function):
    @staticmethod
    def forward(ctx, function, group, choices, x, *tensors):
        tokens = [own[:-1] for own in _batched(tensors, 5)]
        parts = [_Projection(function, *choice, *own) for choice, own in zip(choices, tokens)]
        kept = [part.scores(x) for part in parts]
        r = _apart(function.begin_reduction(_together([local for *_, local in kept]), group)())
        states = [
            (scores, dense, own_r, part.assignment.by_pair(own_r))
            for part, (scores, dense, _), own_r in zip(parts, kept, r)
        ]
        chosen = [of_chosen(logits, part.assignment.candidates) for part, logits in zip(parts, tensors[4::5])]
        own = [(*state, z, *part.assignment, *of) for state, z, part, of in zip(states, chosen, parts, tokens)]
        ctx.save_for_backward(x, *(tensor for projection in own for tensor in projection))
        ctx.function, ctx.group, ctx.scales = function, group, [scale for _, scale in choices]
        return tuple(part.outputs(*state) for part, state in zip(parts, states))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *saved = ctx.saved_tensors
        grads = [grad.contiguous() for grad in grads]
        works = [
            _Backward(_Projection(ctx.function, Assignment(*own[5:9]), scale, *own[9:]), *own[:5])
            for scale, own in zip(ctx.scales, _batched(saved, 13))
        ]
        finish = begin_all_reduce(_together([work.to_weights(grad) for work, grad in zip(works, grads)]), ctx.group)
        for work, grad in zip(works, grads):  # hides the all-reduce of T
            work.to_dense_values(grad)
        d_x = None
        for work, total in zip(works, _apart(finish())):
            d_x = work.to_keys_and_inputs(x, total, d_x)
        return None, None, None, d_x, *(gradient for work in works for gradient in work.gradients())


def _batched(tensors: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    return [tensors[start : start + size] for start in range(0, len(tensors), size)]


def _together(columns: list[Tensor]) -> Tensor:
    """Columns [rows, any] side by side. A single one is not copied."""
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


def _apart(columns: Tensor) -> Sequence[Tensor]:
    """Each of the columns [rows, any] as [rows, 1]."""
    return (columns,) if columns.shape[1] == 1 else columns.split(1, -1)


class _Projection:
    """The forward pass of one projection, and its tensors, which the backward pass uses as well."""

    def __init__(
        self,
        function: ScoreFunction,
        assignment: Assignment,
        scale: float,
        keys: Tensor,
        values: Tensor,
        dense_keys: Tensor | None,
        dense_values: Tensor | None,
    ):
        self.function, self.assignment, self.scale = function, assignment, scale
        steps = AtOnce if has_grouped_products(keys.device.type, keys.dtype) else ByCandidate
        self.pairs: PairSteps = steps(function, assignment, scale, keys, values)
        self.dense_keys, self.dense_values = dense_keys, dense_values

    def scores(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """(scores of the pairs, scores of the dense tokens, this rank's statistic of each row [rows, 1])."""
        scores, statistics = self.pairs.scores(x)
        dense, parts = None, [statistics]
        if self.dense_keys is not None:
            dense = PLAIN.scores(x, self.dense_keys.mT)
            parts.append(self.function.statistic(dense))
        return scores, dense, self.function.combine(_together(parts))

    def outputs(self, scores: Tensor, dense: Tensor | None, r: Tensor, of_pairs: Tensor) -> Tensor:
        """`of_pairs`: r of the pairs [pairs, 1]."""
        out = None
        if dense is not None and self.dense_values is not None:
            out = multiply(self.function.weights(dense, r, self.scale), self.dense_values)
        return self.pairs.outputs(scores, of_pairs, out)


class _Backward:
    """The backward pass of one projection. D and then dA overwrite dS."""

    def __init__(
        self,
        projection: _Projection,
        scores: Tensor,
        dense: Tensor | None,
        r: Tensor,
        of_pairs: Tensor,
        chosen_logits: Tensor,
    ):
        self.projection = projection
        self.scores, self.dense, self.r, self.of_pairs = scores, dense, r, of_pairs
        self.chosen_logits = chosen_logits
        self.dense_key_grads: Tensor | None = None
        self.dense_value_grads: Tensor | None = None

    def to_weights(self, grad: Tensor) -> Tensor:
        """Computes D, and the gradients of gates and values in slots. Returns this rank's T of each row [rows, 1]."""
        own = self.projection
        self.d, total, self.products, self.value_grads = own.pairs.to_weights(self.scores, self.of_pairs, grad)
        if self.dense is not None and own.dense_values is not None:
            self.d_dense = PLAIN.scores(grad, own.dense_values.mT)
            self.s_dense, dense_total = own.function.backward(self.dense, self.r, self.d_dense, own.scale)
            total += dense_total
        return total

    def to_dense_values(self, grad: Tensor) -> None:
        """Computes the gradient of the dense values, which does not depend on T."""
        if self.dense is not None:
            self.dense_value_grads = multiply(self.s_dense.mT, grad)
            del self.s_dense

    def to_keys_and_inputs(self, x: Tensor, total: Tensor, d_x: Tensor | None) -> Tensor:
        """Computes the gradients of the keys with `total`, T over all ranks. Returns the gradient of x, added to `d_x`
        in its memory if there is one."""
        own = self.projection
        if self.dense is not None and own.dense_keys is not None:
            own.function.couple(self.dense, self.r, total, self.d_dense, own.scale)
            self.dense_key_grads = multiply(self.d_dense.mT, x)
            d_x = add_product(self.d_dense, own.dense_keys, d_x)
        self.key_grads, d_x = own.pairs.to_keys_and_inputs(self.scores, self.of_pairs, self.d, total, x, d_x)
        return d_x

    def gradients(self) -> tuple[Tensor | None, ...]:
        """The gradients of keys, values, dense keys, dense values and the logits."""
        candidates, num_candidates = self.projection.assignment.candidates, self.projection.assignment.ends.shape[1]
        logits = gate_gradient(self.chosen_logits, candidates, num_candidates, self.products)
        return self.key_grads, self.value_grads, self.dense_key_grads, self.dense_value_grads, logits
