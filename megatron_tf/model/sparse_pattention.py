"""Pattention over the tokens that a position chooses: more parameter tokens at the same cost.

The tokens of a bank lie in slots, a slot has m candidates of g tokens each, and a position uses one candidate of every
slot. The layer is the dense Pattention over the chosen tokens, and those that every position uses:

    A = X K_chosenᵀ,   S = θ(A),   out = S V_chosen

θ sees all chosen tokens of a row, so τ, learning rates and initial values are those of a dense model with as many
tokens. With one candidate a slot it is that dense model. Ranks of the tensor group hold whole slots: each has the same
work by construction, none needs to know what another one chose, and the exchange is the dense layer's one number a row.

| tensor | local shape |
|---|---|
| X | [..., d_in], whole on every rank |
| bank: K, V | [slots/T · m · g, d_in], [slots/T · m · g, d_out], rows by slot, candidate, token |
| router, balance | [slots/T · m, d_in], [slots/T · m] |
| A, S | [slots/T · rows, g], see `grouped`, and [rows, dense/T] |
| out | [..., d_out], partial: the caller sums it over T |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_tf.activations.function import score_function
from megatron_tf.config.activations import DEFAULT_ACTIVATION
from megatron_tf.model.context import Reports
from megatron_tf.model.grouped import Assignment, assign, empty_gradients, pieces
from megatron_tf.model.kernels import score_layout
from megatron_tf.model.routing import balance_loss, choose, relative_load, straight_through, z_loss
from megatron_tf.parallel.collectives import begin_all_reduce
from megatron_tf.parallel.groups import SINGLE, Group
from megatron_tf.state.parameters import INITIAL_STD, default_scale, shard_range


class TokenBank(nn.Module):
    """The candidates that this rank holds: whole slots, their router and their balance."""

    def __init__(self, num_slots: int, num_candidates: int, group_size: int, d_in: int, d_out: int):
        super().__init__()
        groups = num_slots * num_candidates
        self.shape = num_slots, num_candidates, group_size
        self.key_tokens = nn.Parameter(torch.empty(groups * group_size, d_in))
        self.value_tokens = nn.Parameter(torch.empty(groups * group_size, d_out))
        self.router = nn.Parameter(torch.empty(groups, d_in))
        self.balance = nn.Parameter(torch.empty(groups))
        nn.init.normal_(self.key_tokens, std=INITIAL_STD)
        nn.init.normal_(self.value_tokens, std=1 / d_out**0.5)
        nn.init.normal_(self.router, std=INITIAL_STD)
        nn.init.zeros_(self.balance)

    def logits(self, x: Tensor) -> Tensor:
        """x [rows, d_in] -> z [rows, slots, candidates], at least fp32."""
        logits = (x.to(self.router.dtype) @ self.router.mT).unflatten(-1, self.shape[:2])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def slot_balance(self) -> Tensor:
        """[slots, candidates]."""
        return self.balance.unflatten(0, self.shape[:2])


class SparsePattention(nn.Module):
    """One projection whose positions use `num_tokens` parameter tokens: `dense` ones alike, and a group of each slot.

    `scale` is τ, that of a dense Pattention of `num_tokens` tokens.  `z_loss`: weight of `routing.z_loss`, the mean over
    the slots.
    """

    def __init__(
        self,
        num_tokens: int,
        d_in: int,
        d_out: int,
        *,
        group_size: int,
        candidates: int,
        dense: int = 0,
        scale: float | None = None,
        activation: str = DEFAULT_ACTIVATION,
        group: Group = SINGLE,
        z_loss: float = 0.0,
    ):
        super().__init__()
        self.num_slots = (num_tokens - dense) // group_size
        assert self.num_slots * group_size == num_tokens - dense and self.num_slots % group.size == 0
        self.bank = TokenBank(self.num_slots // group.size, candidates, group_size, d_in, d_out)
        self.key_tokens: nn.Parameter | None = None
        self.value_tokens: nn.Parameter | None = None
        if dense:
            start, stop = shard_range(dense, group.size, group.rank)
            self.key_tokens = nn.Parameter(torch.empty(stop - start, d_in).normal_(std=INITIAL_STD))
            self.value_tokens = nn.Parameter(torch.empty(stop - start, d_out).normal_(std=1 / d_out**0.5))
        self.scale = default_scale(num_tokens, activation) if scale is None else scale
        self.activation = activation
        self.group = group
        self.z_loss = z_loss
        self.choose: Callable[[Tensor, Tensor], Tensor] = choose  # a test of layouts puts recorded choices here
        self.observer: Callable[[Tensor], None] | None = None  # sees each input x [s, b, d], whole on every rank

    def partial(self, x: Tensor, losses: Reports | None = None, metrics: Reports | None = None) -> Tensor:
        """x [..., d_in], whole -> [..., d_out], still to be summed over the group.

        `losses` and `metrics` get what `routing` has to report, as `context` wants it.
        """
        if self.observer is not None:
            self.observer(x)
        rows = x.reshape(-1, x.shape[-1])
        logits = self.bank.logits(rows)
        balance = self.bank.slot_balance()
        candidates = self.choose(logits, balance)
        assignment = assign(candidates, logits.shape[-1])
        if losses is not None and metrics is not None:
            load = relative_load(assignment.ends)
            losses["balance"] = balance_loss(balance, load)
            if self.z_loss:
                losses["z_loss"] = z_loss(logits) * (self.z_loss / self.num_slots)
            metrics["load_max"] = load.amax(1).sum() / self.num_slots
        gate = straight_through(logits, candidates)
        out = sparse_pattention(
            rows, self.bank.key_tokens, self.bank.value_tokens, self.key_tokens, self.value_tokens, gate, assignment,
            self.scale, self.activation, self.group,
        )  # fmt: skip
        return out.view(*x.shape[:-1], out.shape[1])


def sparse_pattention(
    x: Tensor,
    keys: Tensor,
    values: Tensor,
    dense_keys: Tensor | None,
    dense_values: Tensor | None,
    gate: Tensor,
    assignment: Assignment,
    scale: float,
    activation: str,
    group: Group,
) -> Tensor:
    """x [rows, d_in] -> [rows, d_out], still to be summed over `group`.

    `keys`, `values`: of this rank's slots, [slots/T · m · g, width].  `dense_keys`, `dense_values`: of the tokens that
    every position uses.  `gate`: ones [rows, slots/T]; the gradient that it gets is that of a factor on the slot's
    weights S.
    """
    function = score_function(activation)
    device, dtype = x.device.type, keys.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    x, keys, values = (tensor.to(dtype) for tensor in (x, keys, values))
    dense = [x.new_empty(0, 0) if tokens is None else tokens.to(dtype) for tokens in (dense_keys, dense_values)]
    with torch.autocast(device, enabled=False):
        return _SparsePattention.apply(scale, function, group, assignment, x, keys, values, *dense, gate)


class _SparsePattention(Function):
    # Pairs of rows and candidates go piece by piece, see `grouped`. A row's pairs meet in r and in T alone.
    @staticmethod
    def forward(ctx, scale, function, group, assignment, x, keys, values, dense_keys, dense_values, gate):
        by_slot = _by_slot(keys, assignment), _by_slot(values, assignment)
        scores = x.new_empty(assignment.num_pairs, by_slot[0].shape[2])
        for piece in pieces(assignment, x.dtype):
            piece.scores(x.index_select(0, piece.rows), by_slot[0], scores[piece.pairs])
        parts = assignment.by_row(function.statistic(scores))
        dense = score_layout.empty_scores(x, len(x), len(dense_keys))
        if len(dense_keys):
            dense.addmm_(x, dense_keys.mT, beta=0)
            parts = torch.cat([parts, function.statistic(dense)], -1)
        r = function.begin_reduction(function.combine(parts), group)()
        if len(dense_keys):
            out = function.weights(dense, r, scale) @ dense_values
        else:
            out = x.new_zeros(len(x), values.shape[1])
        s = function.weights(scores, assignment.by_pair(r), scale)
        for piece in pieces(assignment, x.dtype):
            out.index_add_(0, piece.rows, piece.outputs(s[piece.pairs], by_slot[1]))
        ctx.save_for_backward(
            x, scores, dense, r, keys, values, dense_keys, dense_values, assignment.order, assignment.ends
        )
        ctx.scale, ctx.function, ctx.group, ctx.gate_dtype = scale, function, group, gate.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scale, function, group = ctx.scale, ctx.function, ctx.group
        x, scores, dense, r, keys, values, dense_keys, dense_values, order, ends = ctx.saved_tensors
        assignment, grad = Assignment(order, ends), grad.contiguous()
        by_slot = _by_slot(keys, assignment), _by_slot(values, assignment)
        key_grads, value_grads = (empty_gradients(tokens, assignment) for tokens in by_slot)
        d, of_pairs = torch.empty_like(scores), assignment.by_pair(r)
        totals, gate_grads = torch.empty_like(of_pairs), torch.empty_like(of_pairs)
        for piece in pieces(assignment, x.dtype):
            own, part = d[piece.pairs], piece.pairs
            own_grad = grad.index_select(0, piece.rows)
            piece.scores(own_grad, by_slot[1], own)
            s, totals[part], gate_grads[part] = function.backward_with_product(scores[part], of_pairs[part], own, scale)
            piece.gradients(s, own_grad, value_grads)
        total = assignment.by_row(totals).sum(-1, keepdim=True)
        d_dense, dense_key_grads, dense_value_grads = score_layout.empty_scores(dense, *dense.shape), None, None
        if len(dense_keys):
            d_dense.addmm_(grad, dense_values.mT, beta=0)
            s, own_total = function.backward(dense, r, d_dense, scale)
            total += own_total
        finish = begin_all_reduce(total, group)
        if len(dense_keys):  # while the sums are on their way
            dense_value_grads = s.mT @ grad
        total = finish()
        if len(dense_keys):
            function.couple(dense, r, total, d_dense, scale)
            dense_key_grads = d_dense.mT @ x
        d_x = d_dense @ dense_keys if len(dense_keys) else torch.zeros_like(x)
        function.couple(scores, of_pairs, assignment.by_pair(total), d, scale)
        for piece in pieces(assignment, x.dtype):
            own = d[piece.pairs]
            piece.gradients(own, x.index_select(0, piece.rows), key_grads)
            d_x.index_add_(0, piece.rows, piece.outputs(own, by_slot[0]))
        return (
            None, None, None, None, d_x, key_grads.view_as(keys), value_grads.view_as(values),
            dense_key_grads, dense_value_grads, assignment.by_row(gate_grads).to(ctx.gate_dtype),
        )  # fmt: skip


def _by_slot(tokens: Tensor, assignment: Assignment) -> Tensor:
    """[slots · m · g, width] -> [slots, m, g, width]."""
    return tokens.view(*assignment.ends.shape, -1, tokens.shape[1])
