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

For a projection with candidates, over its slots. The load of a candidate is relative to an equal share of the
positions:

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
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.architectures.spec import ProjectionSpec
from megatron_tf.config.architectures import architecture_of
from megatron_tf.model.grouped import assign
from megatron_tf.model.observing import Observer, observed
from megatron_tf.model.pattention import token_weights
from megatron_tf.model.projection import Pattention
from megatron_tf.model.routing import relative_load
from megatron_tf.model.sparse_pattention import SparsePattention
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
                observers.append((projection, partial(self._observe, projection, spec.kind, found[spec.kind])))
            elif isinstance(projection, SparsePattention):
                observers.append((projection, partial(_observe_candidates, projection, found[spec.kind])))
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
        return 0 < self._old_tokens.get(kind, 0) < self._num_tokens[kind]

    def _observe(self, projection: Pattention, kind: str, found: list[dict[str, Tensor]], x: Tensor) -> None:
        group, context, tokens = projection.group, self._stage.tensor.context, self._num_tokens[kind]
        norm, weights = token_weights(x, projection.key_tokens, projection.scale, projection.activation, group)
        size = weights.flatten(0, -2).abs().float()  # [positions, n/T]
        total, squares = all_reduce(torch.stack((size.sum(-1), size.square().sum(-1))), group)
        active = torch.where(squares > 0, total.square() / (tokens * squares), 0.0)
        limit = DEAD_BELOW * (squares / tokens).sqrt()
        reached = ((size > 0) & (size >= limit.unsqueeze(-1))).any(0)
        dead = all_reduce(reached.int(), context) == 0
        contribution = all_reduce(size.sum(0), context) * projection.value_tokens.float().norm(dim=1)
        first, last = shard_range(tokens, group.size, group.rank)
        old_tokens = self._old_tokens.get(kind, tokens)
        new = torch.arange(first, last, device=dead.device) >= old_tokens
        counts = torch.stack(
            [dead.sum(), (dead & ~new).sum(), (dead & new).sum(), contribution[new].sum(), contribution.sum()]
        ).double()
        all_dead, old_dead, new_dead, by_new, by_all = all_reduce(counts, group)
        found.append(
            {
                "score_norm": _mean(norm, context),
                "active_share": _mean(active, context),
                "dead_share": all_dead / tokens,
                "new_share": by_new / by_all if by_all > 0 else by_all,
                "old_dead_share": old_dead / min(old_tokens, tokens),
                "new_dead_share": new_dead / max(1, tokens - old_tokens),
            }
        )


def _mean(values: Tensor, context: Group) -> Tensor:
    """Over the positions of all context ranks, of which each has as many."""
    return all_reduce(values.double().mean(), context) / context.size


def _observe_candidates(projection: SparsePattention, found: list[dict[str, Tensor]], x: Tensor) -> None:
    """Sums over the slots of all ranks, by their number."""
    bank = projection.bank
    logits = bank.logits(x.flatten(0, -2))
    chosen = projection.choose(logits, bank.slot_balance())
    ends = assign(chosen, logits.shape[-1]).ends
    load = relative_load(all_reduce(ends, projection.context)).double()
    shares = load / load.shape[1]
    spread = torch.special.entr(shares).sum(1).exp() / load.shape[1]
    # keys and values of a slot's candidates: [slots, candidates, elements]
    tokens = torch.cat([part.unflatten(0, bank.shape).flatten(2) for part in (bank.key_tokens, bank.value_tokens)], -1)
    distance = (tokens - tokens.mean(1, keepdim=True)).flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1)
    unused = (load < UNUSED_BELOW).double().mean(1)
    sums = torch.stack([load.amax(1).sum(), spread.sum(), unused.sum(), distance.double().sum()])
    found.append(dict(zip(OF_CANDIDATES, all_reduce(sums, projection.group) / projection.num_slots)))
