"""What the routers of an arm have done over time: what its runs have logged as health of their candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from megatron_tf.config.sections.model import Model
from megatron_tf.state.parameters import projections
from megatron_tf.study.plan import Node
from megatron_tf.telemetry.plot import read_run

Json = dict[str, Any]
# Of several seeds the worst one counts; of how far copies are apart, the nearest
WORST: Mapping[str, Callable[[Iterable[float]], float]] = {
    "load_max": max,
    "load_spread": min,
    "unused_share": max,
    "copy_distance": min,
}


def routing_of(nodes: Sequence[Node]) -> Json | None:
    """Of the runs of one arm that have ended, by kind of projection: `candidates` of all layers, `steps` at which all
    of the runs have logged their health, and there each measure of `WORST`. None without any."""
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
    """By kind of projection, how many there are in all layers; kinds without any are left out."""
    found: dict[str, int] = {}
    for projection in projections(model).values():
        if projection.bank is not None:
            found[projection.kind] = found.get(projection.kind, 0) + projection.bank.slots * projection.bank.candidates
    return found


def _looks(node: Node) -> dict[int, Json]:
    """By step, what a run has logged; nothing where its folder was moved without its metrics."""
    if not (node.folder / "metrics.jsonl").is_file():
        return {}
    found: dict[int, Json] = {}
    for record in read_run(node.folder).records:
        found.setdefault(record["step"], {}).update(record)
    return found


def _has(record: Json, kind: str) -> bool:
    return all(record.get(f"health/{kind}/{name}") is not None for name in WORST)
