"""The use of a model's parameter tokens, measured in the forward pass of one held micro batch.

Of each Pattention, with scores A = X Kᵀ and weights S = θ(A) over all its n tokens, and averaged over the layers (and
over query, key and value) of a kind of projection:

| metric | meaning |
|---|---|
| `score_norm` | ‖A‖₂, mean over the positions |
| `active_share` | (Σ|S|)² / (n·ΣS²), mean over the positions: share of the tokens in use, 1/n for a single one |
| `dead_share` | share of the tokens whose |S| nowhere reaches 1 % of the position's root mean square |
| `new_share` | after a growth: share of the new tokens in the contributions Σ|S|·‖v‖ over the positions |
| `old_dead_share`, `new_dead_share` | after a growth: share of dead tokens among the old and among the new ones |

In a projection with candidates a position uses n tokens of more. There, dead tokens are a share of all of them, and
new tokens are known only of a bank that is new as a whole. It also has metrics of its slots. The load of a candidate is
relative to an equal share of the positions:

| metric | meaning |
|---|---|
| `load_max` | the largest load, mean over the slots |
| `load_spread` | exp(entropy of the loads) over the number of candidates: 1 is even, 1/candidates is all on one |
| `unused_share` | share of the candidates with a load below 0.1 |
| `copy_distance` | √(Σ‖w − mean of the slot‖² / Σ‖w‖²) over keys and values: 0 for copies, near 1 for other tokens |

Each rank measures its own tokens and positions, and sums go over the tensor and context groups; every data-parallel
rank measures the same batch. The measurement changes no gradient, random state or other state of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.architectures.spec import ProjectionSpec
from megatron_tf.config.architectures import architecture_of
from megatron_tf.model.grouped import Assignment, assign
from megatron_tf.model.observing import Observer, observed
from megatron_tf.model.pattention import token_weights
from megatron_tf.model.projection import Pattention
from megatron_tf.model.routing import relative_load
from megatron_tf.model.sparse_pattention import SparsePattention, chosen_weights
from megatron_tf.model.stage import Stage
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import Group
from megatron_tf.runtime.agreement import together
from megatron_tf.state.parameters import shard_range
from megatron_tf.tasks.data import OpenData
from megatron_tf.training.running import Run

DEAD_BELOW = 0.01  # of the root mean square of a position's weights
ALWAYS = ("score_norm", "active_share", "dead_share")
AFTER_GROWTH = ("new_share", "old_dead_share", "new_dead_share")
OF_CANDIDATES = ("load_max", "load_spread", "unused_share", "copy_distance")
NAMES = ALWAYS + AFTER_GROWTH + OF_CANDIDATES
UNUSED_BELOW = 0.1  # of an equal share of the positions


IN_WORDS = {
    "active_share": "{:.0%} of the tokens active",
    "dead_share": "{:.0%} dead",
    "new_share": "{:.0%} of the output by new ones",
    "load_max": "fullest candidate {:.2f} × an equal share",
    "unused_share": "{:.0%} of the candidates unused",
    "copy_distance": "copies {:.2f} apart",
}


def in_words(found: Mapping[str, float]) -> list[str]:
    """A line for each kind of projection, of metrics as `HealthProbe.measure` returns them."""
    by_kind: dict[str, list[str]] = {}
    for name, value in found.items():
        _, kind, metric = name.split("/")
        if metric in IN_WORDS:
            by_kind.setdefault(kind, []).append(IN_WORDS[metric].format(value))
    return [f"health of {kind}: {', '.join(words)}" for kind, words in by_kind.items()]


def health_probe(
    run: Run, stage: Callable[[], Stage], data: OpenData, old_tokens: Mapping[str, int]
) -> HealthProbe | None:
    """The probe that the configuration asks for, on the first samples held out. All ranks call it together."""
    config, topology = run.config, run.plan.topology
    measured = architecture_of(config.model).projections(config.model)
    if config.logging.health_interval_steps is None or not measured:
        return None
    sources, size = config.data.validation or config.data.train, config.training.micro_batch_size
    inputs, _ = together(lambda: next(data.loader(sources, micro_batch_size=size, num_micro_batches=1).step_batches(0)))
    is_reporter = topology.coordinate("replicas", run.rank) == 0 and topology.coordinate("tensor", run.rank) == 0
    return HealthProbe(stage(), inputs, measured, old_tokens, is_reporter)


class HealthProbe:
    """Measures a model, always on the same batch."""

    def __init__(
        self,
        stage: Stage,
        inputs: Tensor,
        projections: Sequence[ProjectionSpec],
        old_tokens: Mapping[str, int],
        is_reporter: bool,
    ):
        """`inputs` [b, ...] of the task, the same on all ranks.  `projections`: of the whole model.

        `old_tokens`: of each kind before the last growth.
        `is_reporter`: one rank of those that hold the same layers.
        """
        self._stage = stage
        self._inputs = inputs
        self._projections = projections
        self._num_tokens = {projection.kind: projection.tokens for projection in projections}
        # of kinds with candidates: the tokens that all positions use
        self._common_tokens = {p.kind: p.tokens - p.bank.used_tokens for p in projections if p.bank}
        self._old_tokens = old_tokens
        self._is_reporter = is_reporter
        self._device = next(stage.parameters()).device

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The metrics by name, the same on all ranks; all of them must call it."""
        kinds = list(self._num_tokens)
        found: dict[str, list[dict[str, Tensor]]] = {kind: [] for kind in kinds}
        observers: list[tuple[Pattention | SparsePattention, Observer]] = []
        modules = dict(self._stage.named_modules())
        for spec in self._projections:
            projection = modules.get(spec.name)
            if isinstance(projection, Pattention):
                observers.append((projection, partial(self._observe, projection, spec, found[spec.kind])))
            elif isinstance(projection, SparsePattention):
                observers.append((projection, partial(self._observe_candidates, projection, spec, found[spec.kind])))
        # an observer in the graph would compile it anew
        with observed(observers), torch.compiler.set_stance("force_eager"):
            self._stage.infer(self._inputs.to(self._device))
        # of each kind and metric: the sum over the projections that have it, and their number
        sums = torch.zeros(len(kinds), len(NAMES), 2, dtype=torch.float64, device=self._device)
        for row, kind in enumerate(kinds):
            for values in found[kind] if self._is_reporter else ():
                for name, value in values.items():
                    sums[row, NAMES.index(name)] += torch.stack(
                        (value.double(), value.new_ones((), dtype=torch.float64))
                    )
        dist.all_reduce(sums)
        return {
            f"health/{kind}/{metric}": total / count
            for kind, values in zip(kinds, sums.tolist())
            for metric, (total, count) in zip(NAMES, values)
            if count and (metric not in AFTER_GROWTH or self._has_grown(kind))
        }

    def _has_grown(self, kind: str) -> bool:
        """Whether it is known which tokens are new. Next to old candidates it is not."""
        old, common = self._old_tokens.get(kind, 0), self._common_tokens.get(kind)
        return 0 < old < self._num_tokens[kind] and common in (None, old)

    def _observe(self, projection: Pattention, spec: ProjectionSpec, found: list[dict[str, Tensor]], x: Tensor) -> None:
        group, context, tokens = projection.group, self._stage.tensor.context, spec.tokens
        norm, weights = token_weights(x, projection.key_tokens, projection.scale, projection.activation, group)
        first, last = shard_range(tokens, group.size, group.rank)
        new = torch.arange(first, last, device=x.device) >= self._old_tokens.get(spec.kind, tokens)
        use = _Use(norm, weights.flatten(0, -2), _sums, projection.value_tokens, new, tokens)
        found.append(use.metrics(group, context))

    def _observe_candidates(
        self, projection: SparsePattention, spec: ProjectionSpec, found: list[dict[str, Tensor]], x: Tensor
    ) -> None:
        group, context, bank = projection.group, self._stage.tensor.context, projection.bank
        rows = x.flatten(0, -2)
        logits = bank.logits(rows)
        assignment = assign(projection.choose(logits, bank.slot_balance()), logits.shape[-1])
        norm, weights = chosen_weights(projection, rows, assignment)
        slots, candidates, group_size = bank.shape
        numbers = assignment.candidates + candidates * torch.arange(slots, device=x.device)
        common = [] if projection.value_tokens is None else [projection.value_tokens]
        values = torch.cat([*common, bank.value_tokens])
        first_new = len(values) - (len(bank.value_tokens) if self._has_grown(spec.kind) else 0)
        new = torch.arange(len(values), device=x.device) >= first_new

        def sums(columns: Tensor) -> Tensor:
            of_all, of_slots = columns.split([columns.shape[1] - slots * group_size, slots * group_size], dim=1)
            by_candidate = columns.new_zeros(slots * candidates, group_size)
            by_candidate.index_add_(0, numbers.flatten(), of_slots.reshape(-1, group_size))
            return torch.cat([of_all.sum(0), by_candidate.flatten()])

        use = _Use(norm, weights, sums, values, new, spec.tokens)
        found.append(use.metrics(group, context) | _use_of_candidates(projection, assignment))


def _sums(columns: Tensor) -> Tensor:
    return columns.sum(0)


@dataclass(frozen=True)
class _Use:
    """How the positions [p] of a batch use the parameter tokens of a projection that a rank holds.

    `norm`: ‖A‖₂ over the tokens of all ranks, [p, 1].  `weights`: S, [p, tokens that a position uses on this rank].
    `sums`: adds columns of numbers, shaped like `weights`, to one number for each token of this rank.
    `values`: of these tokens, [held, d].  `new`: whether a growth has added them, [held].
    `tokens`: the number that a position uses on all ranks.
    """

    norm: Tensor
    weights: Tensor
    sums: Callable[[Tensor], Tensor]
    values: Tensor
    new: Tensor
    tokens: int

    def metrics(self, group: Group, context: Group) -> dict[str, Tensor]:
        """`ALWAYS` and `AFTER_GROWTH`. `group` holds the other tokens, `context` the other positions."""
        size, new = self.weights.abs().float(), self.new
        total, squares = all_reduce(torch.stack((size.sum(-1), size.square().sum(-1))), group)
        active = torch.where(squares > 0, total.square() / (self.tokens * squares), 0.0)
        limit = DEAD_BELOW * (squares / self.tokens).sqrt()
        reached = self.sums(((size > 0) & (size >= limit.unsqueeze(-1))).float())
        dead = all_reduce(reached, context) == 0
        contribution = all_reduce(self.sums(size), context) * self.values.float().norm(dim=1)
        counts = [dead.sum(), (dead & new).sum(), new.sum(), contribution[new].sum(), contribution.sum()]
        counts.append(counts[0].new_tensor(len(new)))
        all_dead, new_dead, all_new, by_new, by_all, held = all_reduce(torch.stack([c.double() for c in counts]), group)
        return {
            "score_norm": _mean(self.norm, context),
            "active_share": _mean(active, context),
            "dead_share": all_dead / held,
            "new_share": by_new / by_all if by_all > 0 else by_all,
            "old_dead_share": (all_dead - new_dead) / (held - all_new).clamp(min=1),
            "new_dead_share": new_dead / all_new.clamp(min=1),
        }


def _mean(values: Tensor, context: Group) -> Tensor:
    """Over the positions of all context ranks, of which each has as many."""
    return all_reduce(values.double().mean(), context) / context.size


def _use_of_candidates(projection: SparsePattention, assignment: Assignment) -> dict[str, Tensor]:
    """`OF_CANDIDATES`: sums over the slots of all ranks, by their number."""
    bank = projection.bank
    load = relative_load(all_reduce(assignment.ends, projection.context)).double()
    shares = load / load.shape[1]
    spread = torch.special.entr(shares).sum(1).exp() / load.shape[1]
    # keys and values of a slot's candidates: [slots, candidates, elements]
    tokens = torch.cat([part.unflatten(0, bank.shape).flatten(2) for part in (bank.key_tokens, bank.value_tokens)], -1)
    distance = (tokens - tokens.mean(1, keepdim=True)).flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1)
    unused = (load < UNUSED_BELOW).double().mean(1)
    sums = torch.stack([load.amax(1).sum(), spread.sum(), unused.sum(), distance.double().sum()])
    return dict(zip(OF_CANDIDATES, all_reduce(sums, projection.group) / projection.num_slots))
