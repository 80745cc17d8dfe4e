"""Pattention over the tokens that a position chooses: more parameter tokens at the same cost.

The tokens of a bank lie in slots, a slot has m candidates of g tokens each, and a position uses one candidate of every
slot. The layer is the dense Pattention over the chosen tokens, and those that every position uses:

    A = X K_chosenᵀ,   S = θ(A),   out = S V_chosen

θ sees all chosen tokens of a row, so τ, learning rates and initial values are those of a dense model with as many tokens.
With one candidate a slot it is that dense model. Ranks of the tensor group hold whole slots: each has the same work by
construction, none needs to know what another one chose, and the exchange is the dense layer's one number a row.

| tensor | local shape |
|---|---|
| X | [..., d_in], whole on every rank |
| bank: K, V | [slots/T · m · g, d_in], [slots/T · m · g, d_out], rows by slot, candidate, token |
| router, balance | [slots/T · m, d_in], [slots/T · m] |
| A, S | [rows, slots/T · g + dense/T] |
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
from megatron_tf.model.grouped import Assignment, add_outputs, assign, scores_of, token_gradients
from megatron_tf.model.kernels import score_layout
from megatron_tf.model.routing import balance_loss, choose, relative_load, straight_through
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

    `scale` is τ, that of a dense Pattention of `num_tokens` tokens.
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
        self.activation, self.group = activation, group
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

    `keys`, `values`: of this rank's slots, [slots/T · m · g, width].  `dense_keys`, `dense_values`: of the tokens that every
    position uses.  `gate`: ones [rows, slots/T]; the gradient that it gets is that of a factor on the slot's weights S.
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
    @staticmethod
    def forward(ctx, scale, function, group, assignment, x, keys, values, dense_keys, dense_values, gate):
        slots, candidates = assignment.ends.shape
        shaped_keys, shaped_values = (_by_slot(tokens, slots, candidates) for tokens in (keys, values))
        chosen = slots * shaped_keys.shape[2]
        scores = score_layout.empty_scores(x, x.shape[0], chosen + len(dense_keys))
        scores_of(x, shaped_keys, assignment, scores[:, :chosen])
        if len(dense_keys):
            scores[:, chosen:].addmm_(x, dense_keys.mT, beta=0)
        r = function.begin_reduction(function.statistic(scores), group)()
        s = function.weights(scores, r, scale)
        out = s[:, chosen:] @ dense_values if len(dense_keys) else x.new_zeros(x.shape[0], values.shape[1])
        add_outputs(s[:, :chosen], shaped_values, assignment, out)
        ctx.save_for_backward(x, scores, r, keys, values, dense_keys, dense_values, assignment.order, assignment.ends)
        ctx.scale, ctx.function, ctx.group, ctx.gate_dtype = scale, function, group, gate.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scale, function, group = ctx.scale, ctx.function, ctx.group
        x, scores, r, keys, values, dense_keys, dense_values, order, ends = ctx.saved_tensors
        assignment = Assignment(order, ends)
        slots, candidates = ends.shape
        shaped_keys, shaped_values = (_by_slot(tokens, slots, candidates) for tokens in (keys, values))
        chosen = slots * shaped_keys.shape[2]
        grad = grad.contiguous()
        d = score_layout.empty_scores(scores, *scores.shape)
        scores_of(grad, shaped_values, assignment, d[:, :chosen])
        if len(dense_keys):
            d[:, chosen:].addmm_(grad, dense_values.mT, beta=0)
        d_gate = _slot_sums(d[:, :chosen], function.weights(scores, r, scale)[:, :chosen], slots)
        if group.size == 1:
            s = function.backward_and_couple(scores, r, d, scale)
        else:
            s, total = function.backward(scores, r, d, scale)
            finish = begin_all_reduce(total, group)
        value_grads = token_gradients(s[:, :chosen], grad, assignment, shaped_values).view_as(values)
        dense_value_grads = s[:, chosen:].mT @ grad if len(dense_keys) else None
        if group.size > 1:
            function.couple(scores, r, finish(), d, scale)
        d_x = d[:, chosen:] @ dense_keys if len(dense_keys) else torch.zeros_like(x)
        add_outputs(d[:, :chosen], shaped_keys, assignment, d_x)
        key_grads = token_gradients(d[:, :chosen], x, assignment, shaped_keys).view_as(keys)
        dense_key_grads = d[:, chosen:].mT @ x if len(dense_keys) else None
        return (
            None, None, None, None,
            d_x, key_grads, value_grads, dense_key_grads, dense_value_grads, d_gate.to(ctx.gate_dtype),
        )  # fmt: skip


def _by_slot(tokens: Tensor, slots: int, candidates: int) -> Tensor:
    """[slots · m · g, width] -> [slots, m, g, width]."""
    return tokens.view(slots, candidates, -1, tokens.shape[1])


def _slot_sums(first: Tensor, second: Tensor, slots: int) -> Tensor:
    """Σ over the tokens of each slot of first ∘ second: [rows, slots · g] each -> [rows, slots], at least fp32."""
    accumulate = torch.promote_types(first.dtype, torch.float32)
    sums = [
        (own * other).sum(-1, dtype=accumulate) for own, other in zip(first.chunk(slots, -1), second.chunk(slots, -1))
    ]
    return torch.stack(sums, -1)
