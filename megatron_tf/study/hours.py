"""How long a study will take: from what its runs have measured, from a probe, or from a given speed."""

from __future__ import annotations

import heapq
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megatron_tf.costs.estimate import flops_per_token
from megatron_tf.study.plan import Node, Plan
from megatron_tf.study.result import has_ended, read_result

Seconds = Callable[[Node], "float | None"]


@dataclass(frozen=True)
class Speeds:
    """Tokens a second by model, and floating-point operations a second for models that are not among them."""

    by_model: Mapping[str, float]
    flops_per_second: float | None = None

    def seconds(self, node: Node) -> float | None:
        """Of a run from its beginning to its end; None when nothing is known."""
        speed = self.by_model.get(model_key(node))
        if speed is not None:
            return node.own_tokens / speed
        return None if self.flops_per_second is None else node.own_flops / self.flops_per_second


def model_key(node: Node) -> str:
    return json.dumps(
        [node.config.model.model_dump(mode="json"), node.config.training.micro_batch_size], sort_keys=True
    )


def measured(plan: Plan) -> Speeds:
    """From the runs that have ended, whatever else their machine did meanwhile."""
    tokens: dict[str, list[float]] = {}
    flops = []
    for node in plan.nodes:
        if (result := read_result(node)) is not None:
            tokens.setdefault(model_key(node), []).append(result.tokens_per_second)
            flops.append(result.tokens_per_second * flops_per_token(node.config.model))
    by_model = {key: statistics.median(values) for key, values in tokens.items()}
    return Speeds(by_model, statistics.median(flops) if flops else None)


def probe(plan: Plan, steps: int = 4) -> Speeds:
    """Trains each model for some steps on random tokens, on this process alone."""
    import time

    import torch

    from megatron_tf.benchmark.step import TrainingStep
    from megatron_tf.model import build_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    found: dict[str, float] = {}
    for node in plan.nodes:
        if model_key(node) in found:
            continue
        training, model = node.config.training, node.config.model
        step = TrainingStep(build_model(model), training.micro_batch_size, device, types[training.precision])
        step().item()
        began = time.perf_counter()
        for _ in range(steps):
            loss = step()
        loss.item()
        seconds = (time.perf_counter() - began) / steps
        found[model_key(node)] = plan.study.ranks * training.micro_batch_size * model.seq_length / seconds
    return Speeds(found)


def total_seconds(plan: Plan, workers: int, seconds: Seconds) -> float | None:
    """From now to the end of the last run, when each of `workers` takes the next run that can start; None: not known.

    Runs that wait for a sweep start when all of its trials have ended.
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
        # a guess has the name of a run only when its value is the one that will be chosen
        yield from (other for other in plan.nodes if other.name == node.parent.name)
    if node.waits is not None:
        yield from (other for other in plan.nodes if other.is_trial and other.arm.name == node.waits)
