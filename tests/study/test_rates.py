"""Whether one model's best rate is another's, of made-up losses that are parabolas of log rate."""

from __future__ import annotations

import math

import pytest
from study_names import end

from megatron_tf.study.plan import make_plan
from megatron_tf.study.report import results_of
from megatron_tf.study.result import loss_of, read_result
from megatron_tf.study.tables import in_words

RATES = [1e-2, 2e-2, 4e-2]
WIDE = {"model": {"parameter_tokens": {"qkv": 16, "proj": 16, "ffn": 32}}}


@pytest.fixture
def transfer(study):
    """The entry of a study whose wide model is best at `best`; its losses differ by `spread` between the seeds."""
    of = study(
        arms={"going_on": None, "grown": None},
        more=[
            {"name": "wide_at_small", "tokens": 20 * 64, "decay": 0.2, "value_of": "small", "overrides": WIDE},
            {"name": "wide", "tokens": 20 * 64, "decay": 0.2, "overrides": WIDE,
             "sweep": {"key": "optimizer.lr", "values": RATES}},
            {"name": "other", "tokens": 40 * 64, "decay": 0.2, "comparable": False, "value_of": "small",
             "overrides": WIDE},
        ],
    )  # fmt: skip

    def found(best, spread=0.01, bend=0.5):
        while True:
            plan = make_plan(of, loss_of)
            left = [node for node in plan.nodes if node.waits is None and read_result(node) is None]
            if not left:
                return results_of(plan)
            for node in left:
                center = best if node.arm.name.startswith("wide") else 2e-2
                end(node, 3 + bend * math.log(node.value / center) ** 2 + spread * node.seed)

    return found


def test_a_rate_that_serves_both(transfer):
    found = transfer(2.2e-2)
    (entry,) = found["transfers"]
    assert (entry["arm"], entry["of"], entry["twin"]) == ("wide_at_small", "small", "wide")
    assert entry["best_of"]["value"] == pytest.approx(2e-2) and entry["best"]["value"] == pytest.approx(2.2e-2)
    assert entry["ratio"] == pytest.approx(1.1)
    half = math.sqrt(entry["noise"] / 0.5)
    assert entry["noise"] == pytest.approx(0.01 / math.sqrt(2))
    assert math.log(entry["best"]["high"] / entry["best"]["value"]) == pytest.approx(half)
    assert entry["difference"]["mean"] == 0 and entry["verdict"] == "holds"
    line = next(line for line in in_words(found).splitlines() if line.endswith("holds"))
    assert line.split()[:4] == ["wide_at_small", "small", "1.5", "0.02"]


def test_a_rate_that_is_another_one(transfer):
    (entry,) = transfer(3e-2)["transfers"]
    assert entry["difference"]["mean"] > 0.03 and entry["verdict"] == "does not hold"


def test_what_cannot_be_told(transfer):
    (entry,) = transfer(8e-2, spread=0.0)["transfers"]
    assert entry["best"]["low"] is None and entry["verdict"] == "does not hold"
    assert "at an end" in in_words(transfer(8e-2, spread=0.0))
