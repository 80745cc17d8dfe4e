"""How long a study will take, by speeds that ended runs have logged, that a probe measures, or that are given."""

from __future__ import annotations

import heapq
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_tf.benchmark.step import TrainingStep
from megatron_tf.costs.estimate import flops_per_token
from megatron_tf.model import build_model
from megatron_tf.model.precision import DTYPES
from megatron_tf.study.plan import Node, Plan
from megatron_tf.study.result import has_ended, read_result

Seconds = Callable[[Node], "float | None"]


@dataclass(frozen=True)
class Speeds:
    """`by_model`: tokens a second by `model_key`.  `flops_per_second`: for models that are not among them."""

    by_model: Mapping[str, float]
    flops_per_second: float | None = None

    def seconds(self, node: Node) -> float | None:
        """Of a run without its parents; None when its speed is not known."""
        speed = self.tokens_per_second(node)
        return None if speed is None else node.own_tokens / speed

    def tokens_per_second(self, node: Node) -> float | None:
        """Of a run; None when its speed is not known."""
        if (speed := self.by_model.get(model_key(node))) is not None:
            return speed
        return None if self.flops_per_second is None else self.flops_per_second / flops_per_token(node.config.model)


def model_key(node: Node) -> str:
    return json.dumps(
        [node.config.model.model_dump(mode="json"), node.config.training.micro_batch_size], sort_keys=True
    )


def measured(plan: Plan) -> Speeds:
    """Medians over the runs that have ended. Other work of the machine meanwhile is not corrected for."""
    tokens: dict[str, list[float]] = {}
    flops = []
    for node in plan.nodes:
        if (result := read_result(node)) is not None:
            tokens.setdefault(model_key(node), []).append(result.tokens_per_second)
            flops.append(result.tokens_per_second * flops_per_token(node.config.model))
    by_model = {key: statistics.median(values) for key, values in tokens.items()}
    return Speeds(by_model, statistics.median(flops) if flops else None)


def probe(nodes: Sequence[Node], ranks: int, threads: int, rounds: int = 3, steps: int = 4) -> Speeds:
    """Trains each run's model for `steps` steps on random data in this process, `rounds` times; the median counts.

    The models take turns, and each round begins with another one, so that other load on the machine slows all of them.
    `ranks`: processes of a run; the speed of one is multiplied by them.  `threads`: of each process.
    """
    models = {model_key(node): node for node in nodes}
    keys, seconds = list(models), dict[str, list[float]]()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i in range(rounds):
            for key in keys[i % len(keys) :] + keys[: i % len(keys)]:
                seconds.setdefault(key, []).append(_step_seconds(models[key], steps))
    finally:
        torch.set_num_threads(before)
    tokens = {key: node.config.training.micro_batch_size * node.config.model.seq_length for key, node in models.items()}
    return Speeds({key: ranks * tokens[key] / statistics.median(seconds[key]) for key in keys})


def _step_seconds(node: Node, steps: int) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training, model = node.config.training, node.config.model
    step = TrainingStep(build_model(model), training.micro_batch_size, device, DTYPES[training.compute_type])
    step().item()
    began = time.perf_counter()
    for _ in range(steps):
        loss = step()
    loss.item()
    return (time.perf_counter() - began) / steps


def total_seconds(plan: Plan, workers: int, seconds: Seconds) -> float | None:
    """From now to the end of the last run, when each of `workers` takes the next run that can start. Runs that wait

    for a sweep start when all of its trials have ended. None when the length of a run is not known.
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
