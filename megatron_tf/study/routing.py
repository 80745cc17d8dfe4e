"""The use of candidates by the routers of an arm over time, from the health metrics that its runs have logged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron_tf.config.sections.model import Model
from megatron_tf.state.parameters import projections
from megatron_tf.study.plan import Node
from megatron_tf.telemetry.records import RECORDS_NAME, read_records

Json = dict[str, Any]
# how several seeds are reduced to the worst one
WORST: Mapping[str, Callable[[Iterable[float]], float]] = {
    "load_max": max,
    "load_spread": min,
    "unused_share": max,
    "copy_distance": min,
}


def routing_of(nodes: Sequence[Node]) -> Json | None:
    """For the ended runs of one arm, by kind of projection: `candidates`, their number in all layers; `steps` at which
    all runs have logged their health; and each measure of `WORST` at these steps. None without any."""
    if not nodes or not (kinds := _candidates(nodes[0].config.model)):
        return None
    looks = [_looks(node) for node in nodes]
    found = {}
    for kind, count in kinds.items():
        steps = [step for step in looks[0] if all(_has(look.get(step, {}), kind) for look in looks)]
        if steps:
            measures = {
                name: [worst(look[step][f"health/{kind}/{name}"] for look in looks) for step in steps]
                for name, worst in WORST.items()
            }
            found[kind] = {"candidates": count, "steps": steps, **measures}
    return found or None


def _candidates(model: Model) -> dict[str, int]:
    """The number of candidates in all layers, by kind of projection; kinds without any are left out."""
    found: dict[str, int] = {}
    for projection in projections(model).values():
        if projection.bank is not None:
            found[projection.kind] = found.get(projection.kind, 0) + projection.bank.slots * projection.bank.candidates
    return found


def _looks(node: Node) -> dict[int, Json]:
    """The logged values of a run by step; empty when its metrics.jsonl is missing, as after a move of its folder."""
    if not (node.folder / RECORDS_NAME).is_file():
        return {}
    found: dict[int, Json] = {}
    for record in read_records(node.folder):
        found.setdefault(record["step"], {}).update(record)
    return found


def _has(record: Json, kind: str) -> bool:
    return all(record.get(f"health/{kind}/{name}") is not None for name in WORST)
