"""Fewer candidates: measuring their contributions on real data, and choosing which of them stay or are merged.

There are two ways to reduce the m candidates of a slot to m'.

| way | a candidate of the smaller model | possible |
|---|---|---|
| `drop` | an old one: the m' of a slot that contribute most stay | always |
| `merge` | the mean of m/m' neighbours: tokens weighted by use, routers and balances equally | m' divides m |

The contribution of a candidate is Σ |S_i|·‖v_i‖ over its tokens and the positions that chose it, as in `criterion`. The
positions of a dropped candidate choose among the others. The copies that `split` makes of one candidate are neighbours,
so merging undoes a split: the mean of equal copies is that copy, and routers ρ_j + δ_k have the mean ρ_j + mean δ,
whose second part is the same for all j and does not affect the choice. Which way is better depends on how far the
copies have diverged, and is measured.

A position uses as many tokens as before, so τ stays. With one candidate in each slot the model is dense: its tokens are
the dense ones, followed by those of the slots in their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_tf.activations.function import score_function
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.sections.model import Model
from megatron_tf.data.loader import Batch
from megatron_tf.errors import CheckpointError
from megatron_tf.model.attention import document_starts
from megatron_tf.model.grouped import assign, candidate_pieces
from megatron_tf.model.observing import observed
from megatron_tf.model.routing import choose
from megatron_tf.model.sparse_pattention import SparsePattention
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.pruning.criterion import SCORE_ELEMENTS
from megatron_tf.state.parameters import projections

DROP, MERGE = "drop", "merge"
# By projection, fp64 [slots, m', m]: the share of each old candidate in each candidate of the smaller model.
Mixtures = Mapping[str, Tensor]


def even_shares(mixture: Tensor) -> Tensor:
    """A `Mixtures` value in which all candidates that have a share have the same: of routers and balances."""
    return (mixture > 0).double() / (mixture > 0).sum(-1, keepdim=True)


@dataclass
class Use:
    """How one projection used its candidates: the positions that chose each, and its contribution; fp64 [slots, m]."""

    positions: Tensor
    contributions: Tensor

    def dropped_share(self, mixture: Tensor) -> float:
        """The share of all contributions, 0 to 1, from candidates that have no share in the smaller model."""
        total = float(self.contributions.sum())
        return float(self.contributions[mixture.sum(1) == 0].sum()) / total if total else 0.0


def with_candidates(model: Model, counts: Mapping[str, int]) -> Model:
    """`model` with `counts` candidates in each slot, by kind of projection; 1 makes the projection dense."""
    sections = architecture_of(model).sparse_sections(model) or {}
    smaller = {kind: {**bank, "candidates": counts[kind]} for kind, bank in sections.items()}
    return architecture_of(model).with_sparse(model, smaller or None)


@torch.no_grad()
def measure_use(model: TokenFormer, batches: Iterable[Batch], ends: Sequence[int] = ()) -> dict[str, Use]:
    """The `Use` of each projection that has candidates, by name, over `batches`. `ends`: the tokens after which
    attention begins anew. CheckpointError when contributions are not finite."""
    found: dict[str, Use] = {}
    observers = []
    for name, projection in model.named_modules():
        if isinstance(projection, SparsePattention):
            slots, candidates, _ = projection.bank.shape
            found[name] = Use(*torch.zeros(2, slots, candidates, dtype=torch.float64))
            observers.append((projection, partial(add_use, projection, found[name])))
    with observed(observers):
        for ids, _ in batches:
            model.hidden_states(ids, document_starts(ids, ends))
    for name, use in found.items():
        if not use.contributions.isfinite().all():
            raise CheckpointError(
                f"{name}: what its candidates contribute is not finite: the training diverged. Use an earlier "
                "checkpoint."
            )
    return found


def add_use(projection: SparsePattention, use: Use, x: Tensor) -> None:
    """Adds the choices of positions x [..., d_in], and the contributions of the chosen candidates, to `use`."""
    function, bank = score_function(projection.activation), projection.bank
    slots, candidates, size = bank.shape
    keys, values = bank.key_tokens.unflatten(0, bank.shape), bank.value_tokens.unflatten(0, bank.shape)
    norms = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
    dense = 0 if projection.key_tokens is None else len(projection.key_tokens)
    used = dense + slots * size
    for rows in x.flatten(0, -2).split(max(1, SCORE_ELEMENTS // used)):
        chosen = choose(bank.logits(rows), bank.slot_balance())
        of_candidates = list(candidate_pieces(assign(chosen, candidates)))
        scores = rows.new_empty(len(rows), used)
        if projection.key_tokens is not None:
            scores[:, :dense] = rows @ projection.key_tokens.mT
        places = [slice(dense + piece.slot * size, dense + (piece.slot + 1) * size) for piece in of_candidates]
        for piece, place in zip(of_candidates, places):
            scores[piece.rows, place] = rows[piece.rows] @ keys[piece.slot, piece.candidate].mT
        _, weights = function.statistic_and_weights(scores, projection.scale)
        for piece, place in zip(of_candidates, places):
            summed = weights[piece.rows, place].abs().sum(0, dtype=torch.float64)
            use.contributions[piece.slot, piece.candidate] += summed @ norms[piece.slot, piece.candidate]
            use.positions[piece.slot, piece.candidate] += len(piece.rows)


def mixtures(use: Mapping[str, Use], smaller: Model) -> dict[str, Mixtures]:
    """The `Mixtures` of each possible way to the candidates of the model `smaller`, by DROP and MERGE."""
    banks = {name: spec.bank for name, spec in projections(smaller).items()}
    return ways_to(use, {name: bank.candidates if (bank := banks[name]) else 1 for name in use})


def ways_to(use: Mapping[str, Use], counts: Mapping[str, int]) -> dict[str, Mixtures]:
    """The `Mixtures` of each possible way to `counts` candidates in each slot, given by projection."""
    ways: dict[str, Mixtures] = {DROP: {name: _dropped(own.contributions, counts[name]) for name, own in use.items()}}
    if all(own.positions.shape[1] % counts[name] == 0 for name, own in use.items()):
        ways[MERGE] = {name: _merged(own.positions, counts[name]) for name, own in use.items()}
    return ways


def _dropped(contributions: Tensor, count: int) -> Tensor:
    """The mixture of `drop`. Of equal contributions the first candidates stay. The order of candidates stays."""
    kept = contributions.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values
    return torch.zeros(*kept.shape, contributions.shape[1], dtype=torch.float64).scatter_(2, kept.unsqueeze(-1), 1.0)


def _merged(positions: Tensor, count: int) -> Tensor:
    """The mixture of `merge`. One is added to each count of positions, so that every neighbour has a share, and
    neighbours that no position chose have equal ones."""
    families = positions.unflatten(1, (count, -1)) + 1
    shares = families / families.sum(-1, keepdim=True)
    mixture = shares.new_zeros(len(positions), count, *families.shape[1:])
    for candidate in range(count):
        mixture[:, candidate, candidate] = shares[:, candidate]
    return mixture.flatten(2)
