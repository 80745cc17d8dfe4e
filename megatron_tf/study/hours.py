"""How long a study will take, by speeds that ended runs have logged, that `probe` measures, or that are given."""

from __future__ import annotations

import heapq
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megatron_tf.costs.estimate import flops_per_token
from megatron_tf.study.plan import Node, Plan
from megatron_tf.study.result import has_ended, read_result

# Of the training section.
OF_SPEED = {
    "micro_batch_size",
    "global_batch_size",
    "precision",
    "activation_checkpointing",
    "compile",
    "norm",
    "scores",
}
Seconds = Callable[[Node], "float | None"]


@dataclass(frozen=True)
class Speeds:
    """`by_key`: tokens a second by `speed_key`.  `flops_per_second`: for models that are not among them."""

    by_key: Mapping[str, float]
    flops_per_second: float | None = None

    def seconds(self, node: Node) -> float | None:
        """Of a run without its parents; None when its speed is not known."""
        speed = self.tokens_per_second(node)
        return None if speed is None else node.own_tokens / speed

    def tokens_per_second(self, node: Node) -> float | None:
        """Of a run; None when its speed is not known."""
        if (speed := self.by_key.get(speed_key(node))) is not None:
            return speed
        return None if self.flops_per_second is None else self.flops_per_second / flops_per_token(node.config.model)


def speed_key(node: Node) -> str:
    """What decides the speed of a run: its model, its layout, its optimizer, and how it trains."""
    config = node.config
    how = config.training.model_dump(mode="json", include=OF_SPEED)
    parts = config.model.model_dump(mode="json"), config.parallel.model_dump(mode="json"), config.optimizer.type, how
    return json.dumps(parts, sort_keys=True)


def measured(plan: Plan) -> Speeds:
    """Medians over the runs that have ended. Other work of the machine meanwhile is not corrected for."""
    tokens: dict[str, list[float]] = {}
    flops = []
    for node in plan.nodes:
        if (result := read_result(node)) is not None and result.tokens_per_second:
            tokens.setdefault(speed_key(node), []).append(result.tokens_per_second)
            flops.append(result.tokens_per_second * flops_per_token(node.config.model))
    by_key = {key: statistics.median(values) for key, values in tokens.items()}
    return Speeds(by_key, statistics.median(flops) if flops else None)


def total_seconds(plan: Plan, workers: int, seconds: Seconds) -> float | None:
    """From now to the end of the last run, when each of `workers` takes the next run that can start.

    Runs that wait for a sweep start when all of its trials have ended. None when the length of a run is not known.
    """
    left = [node for node in plan.nodes if not has_ended(node)]
    lengths = {node.name: seconds(node) for node in left}
    if any(length is None for length in lengths.values()):
        return None
    needs = {node.name: {other.name for other in _before(plan, node)} & lengths.keys() for node in left}
    waiting, running, now = list(left), list[tuple[float, str]](), 0.0
    while waiting or running:
        startable = (node for node in waiting if not needs[node.name])
        while len(running) < workers and (node := next(startable, None)) is not None:
            waiting.remove(node)
            heapq.heappush(running, (now + float(lengths[node.name] or 0.0), node.name))
            startable = (node for node in waiting if not needs[node.name])
        now, ended = heapq.heappop(running)
        for others in needs.values():
            others.discard(ended)
    return now


def _before(plan: Plan, node: Node) -> Iterable[Node]:
    if node.parent is not None:
        # The parent may be a guess that waits for a sweep. Its name is in the plan only if the guess is right.
        yield from (other for other in plan.nodes if other.name == node.parent.name)
    if node.waits is not None:
        yield from (other for other in plan.nodes if other.is_trial and other.arm.name == node.waits)
