"""Pattention over the tokens that a position chooses: more parameter tokens at the same cost.

The tokens of a bank are divided into slots. A slot has m candidates of g tokens each, and a position uses one candidate
of every slot. The layer is the dense Pattention over the chosen tokens and the tokens that every position uses:

    A = X K_chosenᵀ,   S = θ(A),   out = S V_chosen

θ sees all chosen tokens of a row, so τ, learning rates and initial values are those of a dense model with as many
tokens. With one candidate for each slot it is that dense model. Ranks of the tensor group hold whole slots. So all have
the same work, none needs the choices of another, and they exchange one number for each row, as in the dense layer.

| tensor | local shape |
|---|---|
| X | [..., d_in], whole on every rank |
| bank: K, V | [slots/T · m · g, d_in], [slots/T · m · g, d_out], rows by slot, candidate, token |
| router, balance | [slots/T · m, d_in], [slots/T · m] |
| A, S | [slots/T · rows, g], see `grouped`, and [rows, dense/T] |
| out | [..., d_out], partial: the caller sums it over T |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megatron_tf.activations.function import score_function
from megatron_tf.config.activations import DEFAULT_ACTIVATION
from megatron_tf.model.context import Reports, add_report
from megatron_tf.model.filling import fill_normal
from megatron_tf.model.grouped import Assignment, assign
from megatron_tf.model.linear import linear
from megatron_tf.model.pair_steps import ByCandidate
from megatron_tf.model.pattention import weights_of
from megatron_tf.model.routing import balance_loss, choose, relative_load, z_loss
from megatron_tf.model.sparse_function import ChosenTokens, sparse_pattention
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
        fill_normal(self.key_tokens, INITIAL_STD)
        fill_normal(self.value_tokens, 1 / d_out**0.5)
        fill_normal(self.router, INITIAL_STD)
        nn.init.zeros_(self.balance)

    def logits(self, x: Tensor) -> Tensor:
        """x [rows, d_in] -> z [rows, slots, candidates], at least fp32."""
        logits = linear(x.to(self.router.dtype), self.router).unflatten(-1, self.shape[:2])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def slot_balance(self) -> Tensor:
        """[slots, candidates]."""
        return self.balance.unflatten(0, self.shape[:2])


class SparsePattention(nn.Module):
    """One projection whose positions use `num_tokens` parameter tokens: `dense` common ones, and a group of each slot.

    `scale`: τ, that of a dense Pattention with `num_tokens` tokens.  `z_loss`: weight of `routing.z_loss` as a mean
    over the slots.  `context`: the ranks that hold the other positions of the same samples.
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
        context: Group = SINGLE,
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
            self.key_tokens = nn.Parameter(torch.empty(stop - start, d_in))
            self.value_tokens = nn.Parameter(torch.empty(stop - start, d_out))
            fill_normal(self.key_tokens, INITIAL_STD)
            fill_normal(self.value_tokens, 1 / d_out**0.5)
        self.scale = default_scale(num_tokens, activation) if scale is None else scale
        self.activation = activation
        self.group = group
        self.context = context
        self.z_loss = z_loss
        self.choose: Callable[[Tensor, Tensor], Tensor] = choose  # checks replace it by recorded choices
        self.observer: Callable[[Tensor], None] | None = None  # sees each input x [s, b, d], whole on every rank

    def partial(self, x: Tensor, losses: Reports | None = None, metrics: Reports | None = None) -> Tensor:
        """x [..., d_in], whole -> [..., d_out], still to be summed over the group.

        Adds the auxiliary losses and metrics of `routing` to `losses` and `metrics`, partial as `context` defines it.
        """
        return sparse_outputs([self], x, losses, metrics)[0]

    def chosen(self, rows: Tensor, losses: Reports | None, metrics: Reports | None) -> ChosenTokens:
        """The tokens that `rows` [rows, d_in] choose. Adds to `losses` and `metrics`."""
        logits = self.bank.logits(rows)
        balance = self.bank.slot_balance()
        candidates = self.choose(logits, balance)
        assignment = assign(candidates, logits.shape[-1])
        if losses is not None and metrics is not None:
            load = relative_load(assignment.ends)
            add_report(losses, "balance", balance_loss(balance, load))
            if self.z_loss:
                add_report(losses, "z_loss", z_loss(logits) * (self.z_loss / self.num_slots))
            shares = load / self.num_slots
            add_report(metrics, "load_max", shares if self.context.size > 1 else shares.amax(1).sum())
        bank = self.bank
        return ChosenTokens(
            assignment, self.scale, bank.key_tokens, bank.value_tokens, self.key_tokens, self.value_tokens, logits
        )


def chosen_weights(projection: SparsePattention, rows: Tensor, assignment: Assignment) -> tuple[Tensor, Tensor]:
    """(‖A‖₂ over all tokens that a row uses [rows, 1], this rank's S [rows, dense/T + slots/T · g]), to look at.

    `rows` [rows, d_in].  Not differentiable.
    """
    bank, function = projection.bank, score_function(projection.activation)
    steps = ByCandidate(function, assignment, projection.scale, bank.key_tokens, bank.value_tokens)
    of_pairs, _ = steps.scores(rows)
    of_slots = of_pairs[assignment.places.long()].flatten(1)
    of_all = [] if projection.key_tokens is None else [rows @ projection.key_tokens.mT]
    return weights_of(torch.cat([*of_all, of_slots], 1), projection.scale, projection.activation, projection.group)


def sparse_outputs(
    projections: Sequence[SparsePattention],
    x: Tensor,
    losses: Reports | None = None,
    metrics: Reports | None = None,
) -> tuple[Tensor, ...]:
    """Outputs [..., d_out] of projections that share x [..., d_in], each still to be summed over their group."""
    for projection in projections:
        if projection.observer is not None:
            projection.observer(x)
    rows = x.reshape(-1, x.shape[-1])
    chosen = [projection.chosen(rows, losses, metrics) for projection in projections]
    outputs = sparse_pattention(rows, chosen, projections[0].activation, projections[0].group)
    return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outputs)
