"""Arms against others: at equal floating-point operations, at equal loss, and for all sizes at once.

A *curve* has the points (FLOPs, loss) of one model that was annealed at several budgets, for one seed. Curves are not
extrapolated: beyond their ends a cost is only a bound, and a difference is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron_tf.config.sections.model import Model
from megatron_tf.costs.estimate import flops_per_token
from megatron_tf.study.file import Arm
from megatron_tf.study.plan import Node, Plan
from megatron_tf.study.result import Result
from megatron_tf.study.statistics import Cost, cheapest, interval, loss_at

Json = dict[str, Any]
Curve = Sequence[tuple[float, float]]
# one baseline: by seed, the curves, of which the best counts
Baseline = Mapping[int, Sequence[Curve]]

BEST_STATIC = "best static"


def family_baselines(plan: Plan, runs: Mapping[str, Result]) -> dict[str, Baseline]:
    """Families by name, each with the seeds that have at least two points."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for node, result in counted(plan, runs):
        if node.arm.family is not None:
            found.setdefault(node.arm.family, {}).setdefault(node.seed, []).append((result.flops, result.loss))
    return {
        name: {seed: [points] for seed, points in of.items() if len(points) > 1}
        for name, of in found.items()
        if any(len(points) > 1 for points in of.values())
    }


def static_curves(plan: Plan, runs: Mapping[str, Result]) -> dict[int, dict[Model, list[tuple[float, float]]]]:
    """By seed and model, the points of the arms that have not grown."""
    found: dict[int, dict[Model, list[tuple[float, float]]]] = {}
    for node, result in counted(plan, runs):
        if not has_grown(node):
            points = found.setdefault(node.seed, {}).setdefault(node.config.model, [])
            points.append((result.flops, result.loss))
    return found


def best_static(curves: Mapping[int, Mapping[Model, Curve]]) -> Baseline:
    """The baseline of all models that have not grown, of which the best counts."""
    return {seed: list(of.values()) for seed, of in curves.items()}


def against(results: Mapping[int, Result], baseline: Baseline, tolerance: float) -> Json | None:
    """An arm against a baseline, at the seeds that both have; None when there are none.

    `ratio`: the FLOPs of the arm over those of the baseline at the same loss, with the interval over seeds; or a
    `bound`, "at most" where the baseline does not reach that loss, "at least" where its first point is below it.
    `difference`: the loss of the arm less that of the baseline at the same FLOPs; None where these are outside the
    curves.
    """
    seeds = [seed for seed in results if baseline.get(seed)]
    if not seeds:
        return None
    found = _ratio([(results[seed].flops, cheapest(results[seed].loss, baseline[seed])) for seed in seeds])
    pairs = []
    for seed in seeds:
        reached = [loss_at(results[seed].flops, curve, tolerance) for curve in baseline[seed]]
        known = [loss for loss in reached if loss is not None]
        if known:
            pairs.append(results[seed].loss - min(known))
    difference = interval(pairs) if pairs else None
    found["difference"] = None if difference is None else {**asdict(difference), "verdict": difference.verdict}
    return found


def growth_of(
    nodes: Sequence[Node], runs: Mapping[str, Result], curves: Mapping[int, Mapping[Model, Curve]]
) -> Json | None:
    """The gain of a grown arm, from its ended runs `nodes`; None for an arm that has not grown.

    `from_scratch`: its FLOPs over those of its own model from scratch, at equal loss.
    `kappa`: how many tokens of the final model from scratch one token of the smaller models was worth. Growth pays
    above `break_even`: the cost of a token of the smaller models over that of a token of the final one.
    `all_sizes`: FLOPs of an annealed model of every size on the way, and their ratio to the FLOPs of all these models
    from scratch, at equal losses. `sizes_missing`: arms whose size has no run from scratch.
    """
    if not nodes or not has_grown(nodes[0]) or _last_growth(nodes[0]).begin.tokens == 0:
        return None
    with_curve = [node for node in nodes if node.config.model in curves.get(node.seed, {})]
    pairs = [(node, _scratch_cost(node, runs, curves)) for node in with_curve]
    worth = [_kappa(node, cost) for node, cost in pairs]
    return {
        "from_scratch": _ratio([(runs[node.name].flops, cost) for node, cost in pairs]) if pairs else None,
        "kappa": _with_bound(worth, [cost for _, cost in pairs], {"more": "at least", "less": "at most"}),
        "break_even": _break_even(nodes[0]),
        "all_sizes": _all_sizes(nodes, runs, curves),
    }


def counted(plan: Plan, runs: Mapping[str, Result]) -> Iterable[tuple[Node, Result]]:
    """The ended runs of all arms, without trials, guesses and runs that have diverged."""
    for arm in plan.study.arms:
        for node in ended_nodes(plan, arm, runs):
            yield node, runs[node.name]


def ended_nodes(plan: Plan, arm: Arm, runs: Mapping[str, Result]) -> list[Node]:
    """The `counted` runs of one arm."""
    ended = [node for node in plan.of(arm) if node.waits is None and node.name in runs]
    return [node for node in ended if math.isfinite(runs[node.name].loss)]


def has_grown(node: Node) -> bool:
    return any(step.parent is not None and step.arm.by == "growth" for step in way_to(node))


def way_to(node: Node) -> list[Node]:
    """The runs that led to `node`, and it, first to last."""
    return [*([] if node.parent is None else way_to(node.parent)), node]


def _scratch_cost(node: Node, runs: Mapping[str, Result], curves: Mapping[int, Mapping[Model, Curve]]) -> Cost:
    return cheapest(runs[node.name].loss, [curves[node.seed][node.config.model]])


def _last_growth(node: Node) -> Node:
    return next(step for step in reversed(way_to(node)) if step.parent is not None and step.arm.by == "growth")


def _kappa(node: Node, cost: Cost) -> float:
    before = _last_growth(node).begin.tokens
    tokens_from_scratch = cost.flops / flops_per_token(node.config.model)
    return (tokens_from_scratch - (node.end.tokens - before)) / before


def _break_even(node: Node) -> float:
    begin = _last_growth(node).begin
    return begin.flops / begin.tokens / flops_per_token(node.config.model)


def _all_sizes(
    nodes: Sequence[Node], runs: Mapping[str, Result], curves: Mapping[int, Mapping[Model, Curve]]
) -> Json | None:
    """The way to a grown model leaves the smaller ones before their decays. A model of every size needs these decays,
    so their FLOPs are added."""
    spent, pairs, missing = [], [], set()
    for node in nodes:
        way = way_to(node)
        sizes = [(here, after) for here, after in zip(way, [*way[1:], None]) if after is None or _grows(after)]
        if any(here.name not in runs for here, _ in sizes):
            continue
        flops = node.end.flops + sum(here.end.flops - after.begin.flops for here, after in sizes if after is not None)
        spent.append(flops)
        own = curves.get(node.seed, {})
        missing |= {here.arm.name for here, _ in sizes if here.config.model not in own}
        if all(here.config.model in own for here, _ in sizes):
            pairs.append((flops, _sum([_scratch_cost(here, runs, curves) for here, _ in sizes])))
    if not spent:
        return None
    ratio = _ratio(pairs) if pairs else {"ratio": None, "low": None, "high": None, "bound": None}
    return {"flops": sum(spent) / len(spent), **ratio, "sizes_missing": sorted(missing)}


def _grows(node: Node) -> bool:
    return node.arm.by == "growth"


def _sum(costs: Sequence[Cost]) -> Cost:
    """Of several models. The sum of bounds in both directions has no bound; its `beyond` is "both"."""
    beyond = {cost.beyond for cost in costs} - {""}
    return Cost(sum(cost.flops for cost in costs), "both" if len(beyond) > 1 else "".join(beyond))


def _ratio(pairs: Sequence[tuple[float, Cost]]) -> Json:
    """The geometric mean of FLOPs over costs. `pairs`: (FLOPs, cost), one for each seed."""
    logs = [math.log(flops / cost.flops) for flops, cost in pairs]
    words = {"more": "at most", "less": "at least"}
    found = _with_bound(logs, [cost for _, cost in pairs], words)
    assert found is not None
    exact = {key: None if found[key] is None else math.exp(found[key]) for key in ("mean", "low", "high")}
    return {"ratio": exact["mean"], "low": exact["low"], "high": exact["high"], "bound": found["bound"]}


def _with_bound(values: Sequence[float], costs: Sequence[Cost], words: Mapping[str, str]) -> Json | None:
    """The interval of `values`, which were computed from `costs`. Where some costs are bounds, only the mean, with
    `words` for its bound; where they are bounds in both directions, nothing. None without values."""
    if not values:
        return None
    beyond = {cost.beyond for cost in costs} - {""}
    if not beyond:
        return {**asdict(interval(values)), "bound": None}
    if len(beyond) > 1 or "both" in beyond:
        return {"mean": None, "low": None, "high": None, "bound": None}
    return {"mean": sum(values) / len(values), "low": None, "high": None, "bound": words[beyond.pop()]}
