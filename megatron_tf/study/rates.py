"""Whether a value that one arm's sweep has chosen, such as a learning rate, is also the best for another model.

An arm with `value_of` takes the value of another arm. Its *twin* is the same but for a sweep of its own. The difference
of their losses is the cost of the other arm's value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron_tf.costs.estimate import num_parameters
from megatron_tf.study.comparison import ended_nodes
from megatron_tf.study.file import Arm
from megatron_tf.study.plan import Node, Plan
from megatron_tf.study.result import Result
from megatron_tf.study.statistics import Interval, Optimum, interval, optimum, pooled_deviation
from megatron_tf.study.sweep import Choice

Json = dict[str, Any]


def transfers_of(plan: Plan, runs: Mapping[str, Result]) -> list[Json]:
    """One entry for each arm that takes another one's value and has a twin with a sweep of its own.

    `noise`: the standard deviation of losses over seeds.  `best_of`, `best`: the optimum of the other arm and of the
    twin, each with the range of values that is not told apart from it (see `optimum`).  `ratio`: of `best` to
    `best_of`.  `difference`: loss at the other arm's value less that at the twin's own.
    `verdict`: "does not hold" where the loss is significantly higher, or the ranges do not overlap and it is higher by
    more than the noise; "holds" where the ranges overlap; else "not decided", as with one seed, or a best value at an
    end of its sweep.
    """
    noise = pooled_deviation(
        [[runs[node.name].loss for node in ended_nodes(plan, arm, runs)] for arm in plan.study.arms]
    )
    found = []
    for arm in plan.study.arms:
        twin = _twin(plan, arm)
        if twin is None or arm.value_of is None:
            continue
        choices = [plan.choices.get(name) for name in (arm.value_of, twin.name)]
        best, own = (_best(choice, noise) for choice in choices)
        losses = [{node.seed: runs[node.name].loss for node in ended_nodes(plan, other, runs)} for other in (arm, twin)]
        pairs = [loss - losses[1][seed] for seed, loss in losses[0].items() if seed in losses[1]]
        if best is None or own is None or not pairs:
            continue
        difference = interval(pairs)
        found.append(
            {
                "arm": arm.name,
                "of": arm.value_of,
                "twin": twin.name,
                "parameters": [
                    num_parameters(plan.of(plan.study.arm(name))[0].config.model) for name in (arm.value_of, arm.name)
                ],
                "best_of": asdict(best),
                "best": asdict(own),
                "ratio": own.value / best.value,
                "noise": noise,
                "difference": asdict(difference),
                "verdict": _verdict(best, own, difference, noise),
            }
        )
    return found


def _verdict(best: Optimum, own: Optimum, difference: Interval, noise: float) -> str:
    if difference.low is None or difference.high is None:
        return "not decided"
    if difference.low > 0:
        return "does not hold"
    if None in (best.low, best.high, own.low, own.high):
        return "not decided"
    if best.overlaps(own):
        return "holds"
    return "does not hold" if difference.mean > noise else "not decided"


def _best(choice: Choice | None, noise: float) -> Optimum | None:
    if choice is None or choice.value is None:
        return None
    finite = {value: loss for value, loss in choice.losses.items() if math.isfinite(loss)}
    return optimum(finite, noise) if finite else None


def _twin(plan: Plan, arm: Arm) -> Arm | None:
    """The arm that is the same, but has a sweep of its own; None without one."""
    if arm.value_of is None:
        return None
    sweep = plan.study.arm(arm.value_of).sweep
    for other in plan.study.arms:
        if sweep is None or other.sweep is None or other.sweep.key != sweep.key or other.name == arm.value_of:
            continue
        if _is_same(plan.of(arm)[0], plan.of(other)[0], sweep.key):
            return other
    return None


def _is_same(one: Node, other: Node, key: str) -> bool:
    facts = ("parent", "by", "at", "flops", "tokens", "decay")
    if any(getattr(one.arm, fact) != getattr(other.arm, fact) for fact in facts):
        return False
    return _without(one.plain, key) == _without(other.plain, key)


def _without(values: Mapping[str, Any], key: str) -> Json:
    """Sections without the value at `key`, such as optimizer.lr."""
    name, _, rest = key.partition(".")
    kept = {**values}
    if not rest:
        kept.pop(name, None)
    elif isinstance(kept.get(name), dict):
        kept[name] = _without(kept[name], rest)
    return kept
