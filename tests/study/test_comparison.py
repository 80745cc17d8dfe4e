"""Arms against curves, of made-up results whose losses fall on straight lines in log FLOPs."""

from __future__ import annotations

import math

import pytest
from study_names import BIGGER

from megatron_tf.costs.estimate import flops_per_token
from megatron_tf.study.comparison import BEST_STATIC
from megatron_tf.study.hours import Speeds, speed_key
from megatron_tf.study.plan import make_plan
from megatron_tf.study.report import results_of
from megatron_tf.study.result import Result, write_result
from megatron_tf.study.tables import in_words

SEEDS = {1: 0.0, 2: 0.01}  # what each seed adds to every loss
BIG = {"model": BIGGER["model"]}


def small_loss(flops):
    return 10 - 0.3 * math.log(flops / 1e7)


def big_loss(flops):
    return 9.9 - 0.5 * math.log(flops / 1e7)


@pytest.fixture
def found(study):
    """What a study has found in which the grown arm ends with `grown_loss`; and its plan."""
    of = study(
        arms={"small": {"sweep": None, "family": "small"}, "going_on": {"family": "small"}},
        more=[
            {"name": "big_half", "flops": 1e7, "decay": 0.2, "comparable": False, "family": "big", "overrides": BIG},
            {"name": "big", "parent": "big_half", "by": "branch", "flops": 4e7, "decay": 0.2, "comparable": False,
             "family": "big"},
            {"name": "middle", "flops": 2e7, "decay": 0.2,
             "overrides": {"model": {"parameter_tokens": {"qkv": 12, "proj": 12, "ffn": 24}}}},
        ],
    )  # fmt: skip
    plan = make_plan(of)

    def results(grown_loss, without=()):
        losses = {
            "grown": lambda flops: grown_loss,
            "middle": lambda flops: 9.95,
            "big": big_loss,
            "big_half": big_loss,
        }
        for node in plan.nodes:
            if node.arm.name in without:
                continue
            loss = losses.get(node.arm.name, small_loss)(node.end.flops) + SEEDS[node.seed]
            node.folder.mkdir(parents=True, exist_ok=True)
            result = Result(
                node.name, node.arm.name, node.seed, None, loss, node.end.tokens, node.end.flops, node.own_tokens,
                node.own_flops, 1.0, 1.0, node.parameters, 1000, (),
            )  # fmt: skip
            write_result(node, result)
        arms = results_of(plan)["arms"]
        return {arm["name"]: arm for arm in arms}, {node.arm.name: node for node in plan.nodes if node.seed == 1}

    results.plan = plan
    return results


def test_seeds_that_have_not_ended_and_seeds_that_disagree_are_said(found):
    found(9.7)
    whole = results_of(found.plan)
    assert "1 of 2 seeds" not in in_words(whole)
    grown = next(node for node in found.plan.nodes if node.arm.name == "grown" and node.seed == 2)
    (grown.folder / "result.json").unlink()
    part = results_of(found.plan)
    assert [line.count("1 of 2 seeds") for line in in_words(part).splitlines() if line.startswith("grown")][0] == 1
    part["arms"][0]["cost_against"] = {"big": {"difference": None, "ratio": None, "bound": None, "low": None}}
    assert "some seeds have lower losses than all of big, others higher ones" in in_words(part)


def test_at_equal_flops_and_at_equal_loss(found):
    arms, nodes = found(9.7)
    grown, end = arms["grown"]["cost_against"], nodes["grown"].end.flops
    assert list(grown) == ["small", "big", BEST_STATIC]
    big = grown["big"]
    assert big["ratio"] == pytest.approx(end / (1e7 * math.exp(0.4)), rel=1e-3) and big["bound"] is None
    # seeds differ alike in arm and curve, so nothing is left of it
    assert (big["low"], big["high"]) == (pytest.approx(big["ratio"]), pytest.approx(big["ratio"]))
    assert big["difference"]["mean"] == pytest.approx(9.7 - big_loss(end), abs=1e-6)
    assert big["difference"]["verdict"] == "worse"
    assert grown["small"]["difference"]["mean"] == pytest.approx(9.7 - small_loss(end), abs=1e-3)
    assert arms["going_on"]["cost_against"].keys() == {"big"}


def test_what_a_curve_does_not_reach_is_a_bound(found):
    arms, nodes = found(9.7)
    small, end = arms["grown"]["cost_against"]["small"], nodes["grown"].end.flops
    assert small["ratio"] == pytest.approx(end / nodes["going_on"].end.flops) and small["bound"] == "at most"
    assert small["low"] is None and small["high"] is None
    easy, _ = found(11.0)
    bound = easy["grown"]["cost_against"]["big"]
    assert bound["bound"] == "at least" and bound["ratio"] == pytest.approx(end / nodes["big_half"].end.flops)
    assert arms["small"]["cost_against"]["big"]["difference"]["verdict"] == "worse"


def test_flops_beyond_a_curve_have_no_loss(found):
    """The big model from scratch takes twice what the small one was trained for."""
    arms, _ = found(9.7)
    assert arms["big"]["cost_against"]["small"]["difference"] is None
    lines = in_words(results_of(found.plan)).splitlines()
    assert any(line.split()[:2] == ["big", "small"] and "beyond its budgets" in line for line in lines)


def test_the_best_static_model_is_whichever_is_cheapest(found):
    arms, _ = found(9.7)
    grown = arms["grown"]["cost_against"]
    assert grown[BEST_STATIC] == grown["big"]
    # at a higher loss the small model, and one without a curve, may take less than what was measured
    easy, nodes = found(9.96)
    best = easy["grown"]["cost_against"][BEST_STATIC]
    assert best["bound"] == "at least"
    assert best["ratio"] == pytest.approx(nodes["grown"].end.flops / nodes["big_half"].end.flops)


def test_what_growth_has_gained(found):
    arms, nodes = found(9.7)
    growth, small, grown = arms["grown"]["growth"], nodes["small"], nodes["grown"]
    scratch = 1e7 * math.exp(0.4)
    dear, cheap = flops_per_token(grown.config.model), flops_per_token(small.config.model)
    assert growth["from_scratch"] == {key: arms["grown"]["cost_against"]["big"][key] for key in growth["from_scratch"]}
    assert growth["kappa"]["mean"] == pytest.approx((scratch / dear - grown.own_tokens) / grown.begin.tokens, rel=1e-2)
    assert growth["break_even"] == pytest.approx(cheap / dear)
    # R = φ + (1 − φ)·(c_s / c_l) / κ
    share = grown.own_tokens / (scratch / dear)
    ratio = share + (1 - share) * growth["break_even"] / growth["kappa"]["mean"]
    assert ratio == pytest.approx(growth["from_scratch"]["ratio"], rel=1e-2)
    # the small model is delivered too: its decay is paid for, its trunk only once
    decay = small.end.flops - grown.begin.flops
    in_all = growth["all_sizes"]
    assert in_all["flops"] == grown.end.flops + decay and in_all["sizes_missing"] == []
    assert in_all["ratio"] == pytest.approx(in_all["flops"] / (small.end.flops + scratch), rel=1e-3)
    assert arms["going_on"]["growth"] is None


def test_a_size_that_was_not_trained_from_scratch(found):
    arms, nodes = found(9.7, without=("big", "big_half"))
    growth = arms["grown"]["growth"]
    assert growth["from_scratch"] is None and growth["kappa"] is None
    assert (growth["all_sizes"]["ratio"], growth["all_sizes"]["sizes_missing"]) == (None, ["grown"])
    assert "no run from scratch of the size of grown" in in_words(results_of(found.plan))


def test_in_words(found):
    found(9.7)
    text = in_words(results_of(found.plan))
    assert "at most 0.99" in text and "loss not reached by small" in text and "κ" in text and "pays above" in text


def test_by_the_clock(found):
    """At equal time an arm whose tokens take twice as long is set against what others have reached in that time."""
    _, nodes = found(9.7)
    speeds = Speeds({speed_key(nodes["small"]): 100.0, speed_key(nodes["grown"]): 50.0})
    asked = []
    whole = results_of(found.plan, lambda nodes: asked.extend(nodes) or speeds)
    assert {node.arm.name for node in asked} == {"small", "going_on", "grown", "big_half", "big", "middle"}
    arms = {arm["name"]: arm["clock"] for arm in whole["arms"]}
    grown, small, on = nodes["grown"], nodes["small"], nodes["going_on"]
    seconds = grown.begin.tokens / 100 + grown.own_tokens / 50
    assert arms["grown"]["seconds"] == pytest.approx(seconds) and arms["grown"]["relative_speed"] == 0.5
    assert arms["going_on"]["seconds"] == pytest.approx(on.end.tokens / 100)
    ends = (small.end.tokens / 100, small_loss(small.end.flops)), (on.end.tokens / 100, small_loss(on.end.flops))
    cost = arms["grown"]["cost_against"]["small"]
    reached = seconds <= ends[1][0] * 1.02
    assert (cost["difference"] is None) != reached and cost["bound"] == "at most"
    assert cost["ratio"] == pytest.approx(seconds / ends[1][0])
    # of this one no speed was measured
    assert arms["middle"] is None
    text = in_words(whole)
    assert "at equal time" in text and "by the clock" in text
    assert results_of(found.plan)["arms"][0]["clock"] is None
