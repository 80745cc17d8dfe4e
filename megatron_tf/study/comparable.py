"""Whether the arms of a study can be compared: the same budget, the same end of the schedule, the same data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_tf.errors import ConfigError
from megatron_tf.study.plan import Node, Plan

NOT_COMPARED = "or set comparable: false in arms that are not to be compared."
REMEDY = f"Give them one, {NOT_COMPARED}"


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
        keys = dict.fromkeys(_budget_key(node) for node in (first, *apart))
        yield (
            f"{' and '.join(keys)}: {first.arm.name} takes {most:.4g} FLOPs with its parents, but {named}: more than "
            f"the tolerance {tolerance:g} apart. Give them the same flops, {NOT_COMPARED}"
        )


def _budget_key(node: Node) -> str:
    """Where the length of a run is given."""
    arm = node.arm
    return "flops" if arm.flops is not None else "tokens" if arm.tokens is not None else "training"


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
