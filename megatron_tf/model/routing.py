"""Routing: the choice of a candidate in each slot, and the balance that spreads positions evenly over candidates.

    z = x · ρ,   choice = argmax over the candidates of a slot of (z + 10 b)

ρ is the router, b the balance of a candidate. The balance affects only the choice; the loss does not depend on it. Its
gradient is the imbalance, load/fair − 1, so a candidate with too many positions becomes less likely. It comes from an
auxiliary loss that is linear in b, so averaging over micro batches, data-parallel and context ranks gives the imbalance
of the global batch, the same for every layout.

The largest score wins; of equal ones the first, and a NaN before all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scales gradients of the balance, so that they hardly count in the norm for clipping. Adam is invariant to the scale.
BALANCE_SCALE = 1e-4
# The balance must change faster than the router, but Adam moves both by about a learning rate at each step.
BALANCE_SPEED = 10.0


def choose(logits: Tensor, balance: Tensor) -> Tensor:
    """int64 [rows, slots]: the chosen candidates. logits [rows, slots, m], balance [slots, m]. Not differentiable."""
    return _sums(logits, balance).argmax(-1)


def choose_among_copies(logits: Tensor, balance: Tensor, originals: Tensor, copies: int) -> Tensor:
    """int64 [rows, slots]: of the copies of `originals`, int64 [rows, slots], the one that `choose` prefers.

    logits [rows, slots, m], balance [slots, m]; the copies of original j are candidates j · copies and those after it.
    """
    families = _sums(logits, balance).unflatten(-1, (-1, copies))
    own = families.gather(2, originals[..., None, None].expand(*originals.shape, 1, copies)).squeeze(2)
    return originals * copies + own.argmax(-1)


def _sums(logits: Tensor, balance: Tensor) -> Tensor:
    return logits.detach() + BALANCE_SPEED * balance.detach()


def of_chosen(logits: Tensor, candidates: Tensor) -> Tensor:
    """z of the chosen candidates: logits [rows, slots, m], candidates [rows, slots] -> [rows, slots, 1]."""
    return logits.gather(-1, candidates.unsqueeze(-1))


def straight_through(logits: Tensor, candidates: Tensor) -> Tensor:
    """[rows, slots] of ones with the gradient of 2σ(z) of the chosen candidate: the gate that the router learns by.

    The formula, for comparisons. A layer multiplies nothing by 1, and computes `gate_gradient`.
    """
    soft = 2 * torch.sigmoid(of_chosen(logits, candidates).squeeze(-1))
    return 1 + (soft - soft.detach())


def gate_gradient(chosen: Tensor, candidates: Tensor, num_candidates: int, gradient: Tensor) -> Tensor:
    """The gradient of the logits [rows, slots, m] from that of the gate, `gradient` [rows, slots].

    chosen: `of_chosen` of the `candidates` [rows, slots]. That is all that must be kept of the logits.
    """
    own = torch.ops.aten.sigmoid_backward(2 * gradient.to(chosen.dtype).unsqueeze(-1), chosen.sigmoid())
    return own.new_zeros(*gradient.shape, num_candidates).scatter_(-1, candidates.unsqueeze(-1), own)


def relative_load(ends: Tensor) -> Tensor:
    """fp32 [slots, m]: positions of each candidate over an equal share. `ends`: see `grouped.Assignment`; they may be
    sums over ranks."""
    counts = ends.view(-1).diff(prepend=ends.new_zeros(1)).view(ends.shape)
    return counts / (counts.sum(1, keepdim=True, dtype=torch.float32).clamp(min=1) / counts.shape[1])


def balance_loss(balance: Tensor, load: Tensor) -> Tensor:
    """The auxiliary loss whose gradient is the imbalance. balance [slots, m], load of `relative_load`."""
    imbalance = (load - 1).mul_(BALANCE_SCALE)
    return torch.dot(balance.float().flatten(), imbalance.flatten())


def z_loss(logits: Tensor) -> Tensor:
    """(log Σ exp z)² over the candidates of a slot, mean over the rows, sum over the slots. logits [rows, slots, m]; 0
    without rows.

    It keeps scores small, because the gate's gradient vanishes where they are large, and the router stops learning.
    Zoph et al., 2022, arXiv 2202.08906, equation 5.
    """
    return logits.logsumexp(-1).square().sum() / max(1, logits.shape[0])
