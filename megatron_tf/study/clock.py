"""The cost of arms in seconds: the tokens of a run and its parents, divided by speeds measured in one session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_tf.study.comparison import counted, way_to
from megatron_tf.study.hours import Speeds
from megatron_tf.study.plan import Node, Plan
from megatron_tf.study.result import Result


def with_seconds(plan: Plan, runs: Mapping[str, Result], speeds: Speeds) -> dict[str, Result]:
    """The `counted` runs by name, with `flops` replaced by the seconds of training up to their ends, so that the
    comparison at equal FLOPs becomes one at equal time. Runs of unknown speed are left out."""
    found = {}
    for node, result in counted(plan, runs):
        if (seconds := seconds_to(node, speeds)) is not None:
            found[node.name] = replace(result, flops=seconds)
    return found


def seconds_to(node: Node, speeds: Speeds) -> float | None:
    """Seconds of training up to the end of a run, parents included up to where the next run leaves them; None when a
    speed is not known."""
    way, total = way_to(node), 0.0
    for here, after in zip(way, [*way[1:], None]):
        until = here.end.tokens if after is None else after.begin.tokens
        speed = speeds.tokens_per_second(here)
        if speed is None:
            return None
        total += (until - here.begin.tokens) / speed
    return total
