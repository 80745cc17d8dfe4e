"""Routers of a split, fitted to the inputs of a projection: each candidate begins with a cluster of positions.

A position's input x matters to a slot by its scores y = (x − x̄) Kᵀ alone, K being the slot's keys and x̄ the mean input.
So the positions of a sample are clustered by their scores, into one cluster for each candidate, and the router scores
the nearest one highest:

    −‖y − c‖² = 2 y·c − ‖c‖² − ‖y‖²,   so   ρ = 2 Kᵀc   and   10 b = −ρ·x̄ − ‖c‖² − p

‖y‖² is the same for all candidates. p is a penalty that grows with a cluster's size, so that they become about equally
large; after that the balance is trained as always. Both are scaled to the size of random routers. A split keeps the
function for any router, so this changes only what its candidates learn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tf.model.routing import BALANCE_SPEED
from megatron_tf.state.parameters import INITIAL_STD

ROUNDS = 25
# How fast the penalty follows a cluster's excess over an equal share, relative to the variance of the scores.
PENALTY = 0.05
# scores that are in memory at the same time, of as many slots as they suffice for: 512 MiB
AT_ONCE = 2**26


def fit_routers(x: Tensor, keys: Tensor, candidates: int, seed: int) -> tuple[Tensor, Tensor]:
    """Routers fp64 [slots, candidates, d] and balances fp64 [slots, candidates] for positions like x [rows, d].

    keys [slots, g, d]: those of each slot, before its split. A slot whose keys are 0 gets random ones for this.
    `seed`: decides where the clusters begin.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(x), (len(keys), candidates), generator=generator).to(x.device)
    directions = torch.randn(keys.shape, generator=generator, dtype=torch.float64).to(x.device)
    x, keys = x.double(), keys.to(x.device).double()
    keys = torch.where(keys.flatten(1).any(1)[:, None, None], keys, directions)
    slots = max(1, AT_ONCE // (len(x) * keys.shape[1]))
    parts = [_fit(x, *part) for part in zip(keys.split(slots), chosen.split(slots))]
    routers, balances = zip(*parts)
    return torch.cat(routers), torch.cat(balances)


def _fit(x: Tensor, keys: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """`fit_routers`, with clusters that begin at the positions `chosen` [slots, candidates]."""
    candidates = chosen.shape[1]
    mean = x.mean(0)
    scores = (x - mean) @ keys.mT
    centres = scores.gather(1, chosen[..., None].expand(-1, -1, scores.shape[-1]))
    step = PENALTY * scores.square().sum(-1).mean(1, keepdim=True)
    penalty = torch.zeros_like(centres[..., 0])
    for _ in range(ROUNDS):
        distances = (centres.square().sum(-1) + penalty).unsqueeze(1) - 2 * scores @ centres.mT
        members = torch.nn.functional.one_hot(distances.argmin(-1), candidates).to(scores)
        sizes = members.sum(1)
        penalty += step * (sizes * (candidates / len(x)) - 1).clamp(-1, 1)
        centres = members.mT @ scores / sizes.clamp(min=1).unsqueeze(-1)
    routers = 2 * centres @ keys
    balances = -(routers @ mean) - centres.square().sum(-1) - penalty
    size = routers.square().mean((1, 2), keepdim=True).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return routers * (INITIAL_STD / size), balances * (INITIAL_STD / BALANCE_SPEED / size[..., 0])
