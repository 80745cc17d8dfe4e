"""Whether the arms of a study can be compared: the same budget, the same end of the schedule, the same data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_tf.errors import ConfigError
from megatron_tf.study.plan import Node, Plan

REMEDY = "Give them one, or set comparable: false in arms that are not to be compared."


def check_comparable(plan: Plan) -> None:
    """ConfigError with the names of the arms that differ in what a comparison needs, and with what they have."""
    nodes = [plan.of(arm)[0] for arm in plan.study.arms if arm.comparable and plan.of(arm)]
    problems = [*_budget_problems(nodes, plan.study.tolerance), *_other_problems(nodes)]
    unmeasured = [arm.name for arm in plan.study.arms if plan.of(arm) and not plan.of(arm)[0].config.data.validation]
    if unmeasured:
        problems.append(
            f"arms {', '.join(unmeasured)}: data.validation is empty, and its loss is the result. Name some."
        )
    if problems:
        raise ConfigError(problems)


def _budget_problems(nodes: Sequence[Node], tolerance: float) -> Iterator[str]:
    if not nodes:
        return
    most = max(node.end.flops for node in nodes)
    apart = [node for node in nodes if node.end.flops < (1 - tolerance) * most]
    if apart:
        first = next(node for node in nodes if node.end.flops == most)
        named = ", ".join(f"{node.arm.name} {node.end.flops:.4g}" for node in apart)
        yield (
            f"flops: {first.arm.name} takes {most:.4g} with its parents, but {named}: more than the tolerance "
            f"{tolerance:g} apart. {REMEDY}"
        )


def _other_problems(nodes: Sequence[Node]) -> Iterator[str]:
    told: dict[str, Callable[[Node], Any]] = {
        "optimizer.schedule: the share of the rate that is left at the end": _end_of_schedule,
        "data.train": lambda node: [(source.path, source.weight) for source in node.config.data.train],
        "data.validation": lambda node: [(source.path, source.weight) for source in node.config.data.validation],
        "evaluation.samples": lambda node: node.config.evaluation.samples,
        "model.seq_length": lambda node: node.config.model.seq_length,
        "data.tokenizer": lambda node: node.config.data.tokenizer,
        "model.task": lambda node: node.config.model.task,
    }
    for what, of in told.items():
        groups: dict[str, list[str]] = {}
        for node in nodes:
            groups.setdefault(str(of(node)), []).append(node.arm.name)
        if len(groups) > 1:
            named = "; ".join(f"{value} in {', '.join(names)}" for value, names in groups.items())
            yield f"{what} differs: {named}. {REMEDY}"


def _end_of_schedule(node: Node) -> str:
    optimizer = node.config.optimizer
    if optimizer.schedule.type == "constant":
        return "1"
    return f"{optimizer.schedule.min_lr / optimizer.lr:.3g}"
