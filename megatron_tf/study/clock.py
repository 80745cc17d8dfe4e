"""What arms cost by the clock: the tokens of a run and its parents, at speeds that were measured one beside another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_tf.study.comparison import counted, way_to
from megatron_tf.study.hours import Speeds
from megatron_tf.study.plan import Node, Plan
from megatron_tf.study.result import Result


def with_seconds(plan: Plan, runs: Mapping[str, Result], speeds: Speeds) -> dict[str, Result]:
    """The runs that count, with the seconds of training that led to their ends in place of FLOPs: then what is said at
    equal FLOPs is said at equal time. Those whose speeds are not known are left out."""
    found = {}
    for node, result in counted(plan, runs):
        if (seconds := seconds_to(node, speeds)) is not None:
            found[node.name] = replace(result, flops=seconds)
    return found


def seconds_to(node: Node, speeds: Speeds) -> float | None:
    """To the end of a run, with those of its parents as far as they lead there."""
    way, total = way_to(node), 0.0
    for here, after in zip(way, [*way[1:], None]):
        until = here.end.tokens if after is None else after.begin.tokens
        speed = speeds.tokens_per_second(here)
        if speed is None:
            return None
        total += (until - here.begin.tokens) / speed
    return total
