"""Whether the arms of a study can be compared: the same budget, the same end of the schedule, the same data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron_tf.config.run_plan import evaluated_samples
from megatron_tf.costs.estimate import flops_per_token
from megatron_tf.errors import ConfigError
from megatron_tf.study.plan import Node, Plan

NOT_COMPARED = "or set comparable: false in arms that are not to be compared."
REMEDY = f"Give them one, {NOT_COMPARED}"


def check_comparable(plan: Plan) -> None:
    """Raises ConfigError with the names and values of comparable arms that differ in budget, schedule or data."""
    nodes = [plan.of(arm)[0] for arm in plan.study.arms if arm.comparable]
    problems = [*_budget_problems(nodes, plan.study.tolerance), *_other_problems(nodes)]
    unmeasured = [arm.name for arm in plan.study.arms if not plan.of(arm)[0].config.data.validation]
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
    if not apart:
        return
    first = next(node for node in nodes if node.end.flops == most)
    keys = " and ".join(dict.fromkeys(_budget_key(node) for node in (first, *apart)))
    asked = [_asked(node) for node in (first, *apart)]
    if min(asked) < (1 - tolerance) * max(asked):
        named = ", ".join(f"{node.arm.name} {node.end.flops:.4g}" for node in apart)
        yield (
            f"{keys}: {first.arm.name} takes {most:.4g} FLOPs with its parents, but {named}: more than "
            f"the tolerance {tolerance:g} apart. Give them the same flops, {NOT_COMPARED}"
        )
        return
    named = ", ".join(_in_steps(node) for node in apart)
    yield (
        f"{keys}: the arms are given the same, but a run has whole steps: with its parents {_in_steps(first)}, but "
        f"{named}: more than the tolerance {tolerance:g} apart. {_longer(first, apart, tolerance)} a smaller "
        f"training.global_batch_size, or the study's tolerance to {_wide(first, apart):.3f}, {NOT_COMPARED}"
    )


def _asked(node: Node) -> float:
    """The FLOPs of an arm as its file gives them, before they are rounded to whole steps."""
    arm = node.arm
    if arm.flops is not None:
        return arm.flops
    if arm.tokens is None:
        return node.end.flops
    return node.end.flops + (arm.tokens - node.end.tokens) * flops_per_token(node.config.model)


def _a_step(node: Node) -> float:
    return node.own_flops / (node.end.step - node.begin.step)


def _in_steps(node: Node) -> str:
    return f"{node.arm.name} takes {node.end.flops:.4g} FLOPs in steps of {_a_step(node):.4g}"


def _longer(first: Node, apart: Sequence[Node], tolerance: float) -> str:
    """The first remedy: the budget above which the rounding of each arm, at most half a step, is tolerated."""
    if tolerance == 0:
        return "Set"
    widest = max(_a_step(node) for node in apart)
    enough = (_a_step(first) + widest) / 2 / tolerance + _a_step(first)
    # 5 % more, because only two digits are shown and might be rounded down
    return f"Give them {1.05 * enough:.2g} FLOPs or more, or set"


def _wide(first: Node, apart: Sequence[Node]) -> float:
    """The smallest tolerance that would do, rounded up to thousandths."""
    share = 1 - min(node.end.flops for node in apart) / first.end.flops
    return math.ceil(1000 * share) / 1000


def _budget_key(node: Node) -> str:
    """The key that gives the length of the run."""
    arm = node.arm
    return "flops" if arm.flops is not None else "tokens" if arm.tokens is not None else "training"


def _other_problems(nodes: Sequence[Node]) -> Iterator[str]:
    told: dict[str, Callable[[Node], Any]] = {
        "optimizer.schedule: the share of the rate that is left at the end": _end_of_schedule,
        "data.train": lambda node: [(source.path, source.weight) for source in node.config.data.train],
        "data.validation": lambda node: [(source.path, source.weight) for source in node.config.data.validation],
        "evaluation.samples, in whole batches of training.global_batch_size": lambda node: evaluated_samples(
            node.config
        ),
        "model.seq_length (of images: by model.image)": lambda node: node.config.model.seq_length,
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
