from __future__ import annotations

import json

import pytest

from megatron_tf.study.plan import make_plan
from megatron_tf.study.routing import routing_of

SPLIT = {"model": {"sparse": {"ffn": {"group_size": 16, "candidates": 4}}}, "growth": {"method": "split"}}


@pytest.fixture
def nodes(study):
    """The runs of an arm that was split, which have logged `looks`: by step, the values of its health."""
    plan = make_plan(study(arms={"small": {"sweep": None}, "grown": {"overrides": SPLIT}}))

    def logged(*looks):
        found = [node for node in plan.nodes if node.arm.name == "grown"]
        for node, of_run in zip(found, looks, strict=True):
            node.folder.mkdir(parents=True)
            (node.folder / "config.yml").write_text("{}")
            names = ("load_max", "load_spread", "unused_share", "copy_distance")
            records = [
                {"step": step, "tokens": 1, **{f"health/ffn/{name}": value for name, value in zip(names, values)}}
                for step, values in of_run.items()
            ]
            lines = [{"step": 5, "tokens": 1, "train/loss": 2.0}, *records]
            (node.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return found

    logged.plan = plan
    return logged


def test_the_worst_of_the_seeds_at_the_steps_of_all(nodes):
    found = routing_of(nodes({5: (1.5, 0.9, 0.0, 0.3), 10: (1.2, 0.95, 0.0, 0.5), 15: (1.0, 1.0, 0.0, 0.6)},
                             {5: (1.4, 0.8, 0.25, 0.4), 10: (1.3, 0.97, 0.0, 0.4)}))  # fmt: skip
    assert found == {
        "ffn": {"candidates": 4, "steps": [5, 10], "load_max": [1.5, 1.3], "load_spread": [0.8, 0.95],
                "unused_share": [0.25, 0.0], "copy_distance": [0.3, 0.4]}
    }  # fmt: skip


def test_without_health_there_is_none(nodes):
    assert routing_of([]) is None and routing_of(nodes({}, {})) is None
    dense = [node for node in nodes.plan.nodes if node.arm.name == "small"]
    assert routing_of(dense) is None


def test_a_folder_without_metrics(nodes):
    assert routing_of([node for node in nodes.plan.nodes if node.arm.name == "grown"]) is None
