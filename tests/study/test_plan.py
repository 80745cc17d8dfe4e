"""The arithmetic of a study's runs, and what makes its arms impossible or incomparable."""

from __future__ import annotations

import re

import pytest
from study_names import BIGGER, problems_of

from megatron_tf.costs.estimate import flops_per_token
from megatron_tf.errors import ConfigError
from megatron_tf.study.comparable import check_comparable
from megatron_tf.study.plan import Position, make_plan

LOSSES = {"small/lr=0.01/seed1": 3.0, "small/lr=0.02/seed1": 2.0, "small/lr=0.04/seed1": 4.0}


def by_name(plan):
    return {node.name: node for node in plan.nodes}


def test_before_a_sweep_has_ended(study):
    """Its trials can start; what depends on the choice is a guess, with the cost that it will have."""
    nodes = by_name(make_plan(study()))
    assert [name for name, node in nodes.items() if node.waits is None] == [*LOSSES]
    assert all(nodes[name].is_trial for name in LOSSES)
    assert {nodes[name].waits for name in nodes.keys() - LOSSES} == {"small"}
    assert len(nodes) == 3 + 1 + 2 * 2


def test_after_a_sweep(study):
    """The trial of the chosen value is the arm's run; children inherit the value and start from it."""
    plan = make_plan(study(), lambda node: LOSSES.get(node.name))
    nodes, choice = by_name(plan), plan.choices["small"]
    assert (choice.value, choice.at_end) == (0.02, False)
    assert not nodes["small/lr=0.02/seed1"].is_trial and all(node.waits is None for node in plan.nodes)
    small, on, grown = (plan.of(study().arm(name))[1] for name in ("small", "going_on", "grown"))
    assert small.name == "small/lr=0.02/seed2" and (small.config.run.seed, grown.config.run.seed) == (2, 2)
    assert on.parent is small and grown.parent is small
    assert on.config.optimizer.lr == grown.config.optimizer.lr == 0.02
    assert small.config.checkpoint.keep_before_decay and not on.config.checkpoint.keep_before_decay
    assert (on.config.branch.source, on.config.branch.at) == (small.config.run.dir, "before_decay")
    assert on.config.growth is None and grown.config.branch is None
    assert (grown.config.growth.source, grown.config.growth.method) == (small.config.run.dir, "gram")


def test_budgets(study):
    """A run ends at its budget, parents included, and decays in a share of all of it."""
    plan = make_plan(study(), lambda node: LOSSES.get(node.name))
    small, on, grown = (plan.of(arm)[0] for arm in plan.study.arms)
    cost, grown_cost = (flops_per_token(node.config.model) for node in (small, grown))
    assert small.end == Position(20, 20 * 64, 20 * 64 * cost)
    assert small.config.optimizer.schedule.decay_steps == 4
    left = 16 * 64 * cost
    assert on.begin == Position(16, 16 * 64, left) and grown.begin == Position(0, 16 * 64, left)
    for node, own in ((on, cost), (grown, grown_cost)):
        steps = node.end.step - node.begin.step
        assert steps == round((2e7 - left) / (64 * own))
        assert node.end.flops == left + steps * 64 * own and node.own_tokens == steps * 64
        assert node.config.training.train_steps == node.end.step
        assert node.config.optimizer.schedule.decay_steps == round(0.2 * 2e7 / (64 * own))


def test_the_value_that_another_sweep_has_chosen(study):
    """Before it has ended, the arm waits; then it has that value, at each of its seeds."""
    more = [{"name": "again", "flops": 2e7, "decay": 0.2, "value_of": "small"}]
    waiting = make_plan(study(more=more))
    assert {node.waits for node in waiting.of(waiting.study.arm("again"))} == {"small"}
    plan = make_plan(study(more=more), lambda node: LOSSES.get(node.name))
    nodes = plan.of(plan.study.arm("again"))
    assert [node.name for node in nodes] == ["again/lr=0.02/seed1", "again/lr=0.02/seed2"]
    assert {(node.config.optimizer.lr, node.waits, node.parent) for node in nodes} == {(0.02, None, None)}


def test_short_trials_are_runs_of_their_own(study):
    sweep = {"key": "optimizer.lr", "values": [1e-2, 2e-2], "flops": 2e6}
    plan = make_plan(study(arms={"small": {"sweep": sweep}}), lambda node: node.value)
    trials = [node for node in plan.nodes if node.is_trial]
    assert [node.name for node in trials] == ["small/trial_lr=0.01/seed1", "small/trial_lr=0.02/seed1"]
    assert {node.end.flops for node in trials} != {plan.of(plan.study.arms[0])[0].end.flops}
    assert [node.name for node in plan.of(plan.study.arms[0])] == ["small/lr=0.01/seed1", "small/lr=0.01/seed2"]


def test_a_chain_inherits_from_the_stage_before(study):
    bigger = {"model": {"parameter_tokens": {"qkv": 32, "proj": 32, "ffn": 64}}}
    more = [{"name": "twice", "parent": "grown", "flops": 4e7, "overrides": bigger, "comparable": False}]
    plan = make_plan(study(more=more), lambda node: LOSSES.get(node.name))
    *_, last = plan.nodes
    assert last.config.growth.method == "gram" and last.config.growth.source == last.parent.config.run.dir
    assert last.parent.config.checkpoint.keep_before_decay


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"arms": {"grown": {"flops": 1e6}}},
            "arm grown: flops: 1e+06, but its parents take 1.116e+07 of them and one step takes",
        ),
        (
            {"arms": {"small": {"tokens": 7}}},
            "arm small: tokens: 7, but one step takes 64, so no step is left to do. Set it to 64 or more.",
        ),
        ({"arms": {"grown": {"decay": 0.95}}}, "arm grown: decay: 0.95 of 2e+07 flops makes"),
        ({"arms": {"grown": {"overrides": {"growth": {"from": "x"}}}}}, "arm grown: growth.from: x, but an arm starts"),
        ({"arms": {"grown": {"overrides": {}}}}, "the smaller model has model.parameter_tokens"),
        (
            {"arms": {"grown": {"overrides": {"growth": {"method": "split"}}}}},
            "candidates: 4}; to go on with the same model, set by: branch.",
        ),
        ({"arms": {"grown": {"parent": None}}}, "arm grown: growth: is given, but the arm has no parent"),
        (
            {"arms": {"small": {"sweep": {"key": "optimizer.lrr", "values": [1.0, 2.0]}}}},
            "arm small: sweep.key: optimizer.lrr",
        ),
        ({"arms": {"grown": {"config": "nowhere.yml"}}}, "arm grown: nowhere.yml: there is no such file"),
        ({"arms": {"grown": {"config": "tiny_chain"}}}, "arm grown: config: tiny_chain is a chain"),
        (
            {"common": {"training": {"stop_when": {"patience": 3}}, "evaluation": {"interval_steps": 2}}},
            "arm small: training.stop_when: would end a run before its budget, which arms are compared at. Set it to",
        ),
        ({"ranks": 3}, "arm small: training.global_batch_size: 4 is not a multiple of 12"),
        ({"common": {"model": {"hidden_size": 9}}}, "arm small: model.hidden_size: 9 is not a multiple"),
    ],
)
def test_arms_that_cannot_be(study, changes, problem):
    found = problems_of(lambda: make_plan(study(**changes)))
    assert any(problem in text for text in found), found


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"arms": {"grown": {"flops": 3e7}}},
            "flops: grown takes 3.001e+07 FLOPs with its parents, but going_on 2.022e+07",
        ),
        ({"arms": {"grown": {"flops": None, "tokens": 4000}}}, "tokens and flops: grown takes"),
        (
            {"arms": {"grown": {"overrides": {"optimizer": {"schedule": {"min_lr": 1e-3}}}}}},
            "the share of the rate that is left at the end differs: 0 in going_on; 0.05 in grown",
        ),
        (
            {"arms": {"grown": {"overrides": {"evaluation": {"samples": 5}}}}},
            "evaluation.samples, in whole batches of training.global_batch_size differs: 4 in going_on; 8 in grown",
        ),
        (
            {"arms": {"grown": {"overrides": {"training": {"global_batch_size": 6, "micro_batch_size": 6}}}}},
            "evaluation.samples, in whole batches of training.global_batch_size differs: 4 in going_on; 6 in grown",
        ),
        ({"common": {"data": {"validation": []}}}, "arms small, going_on, grown: data.validation is empty"),
    ],
)
def test_arms_that_cannot_be_compared(study, changes, problem):
    values = dict(changes)
    for arm in values.get("arms", {}).values():
        if "overrides" in arm:
            arm["overrides"] = {**BIGGER, **arm["overrides"]}
    found = problems_of(lambda: check_comparable(make_plan(study(**values))))
    assert any(problem in text for text in found), found


def test_a_whole_number_can_be_swept(study):
    sweep = {"key": "optimizer.schedule.warmup_steps", "values": [2, 3]}
    plan = make_plan(study(arms={"small": {"sweep": sweep}}))
    assert [node.config.optimizer.schedule.warmup_steps for node in plan.nodes[:2]] == [2, 3]


def test_a_sweep_does_not_go_on_beyond_what_its_key_can_be(study):
    sweep = {"key": "optimizer.layer_decay", "values": [0.8, 0.9, 1.0], "extend": 2}
    of = study(arms={"small": {"sweep": sweep}})
    choice = make_plan(of, lambda node: 4.0 - node.value if node.parent is None else None).choices["small"]
    assert (choice.values, choice.value, choice.at_end) == ((0.8, 0.9, 1.0), 1.0, True)


ROUNDED = {
    "common": {"training": {"global_batch_size": 16}},
    "arms": {
        "small": {"tokens": 20 * 256},
        "going_on": {"flops": 7.4e7},
        "grown": {"flops": 7.4e7},
    },
}


def test_arms_that_are_apart_by_whole_steps_alone(study):
    """The message has FLOPs and those of a step, and each remedy that it names helps."""
    plan = make_plan(study(**ROUNDED))
    with pytest.raises(ConfigError) as refused:
        check_comparable(plan)
    (problem,) = refused.value.problems
    for node in (plan.of(arm)[0] for arm in plan.study.arms if arm.comparable):
        step = 256 * flops_per_token(node.config.model)
        assert f"{node.arm.name} takes {node.end.flops:.4g} FLOPs in steps of {step:.4g}" in problem
    assert "Give them the same flops" not in problem
    enough, tolerance = (float(re.search(f"{word} ([0-9.e+]+)", problem)[1]) for word in ("Give them", "tolerance to"))
    check_comparable(make_plan(study(**ROUNDED, tolerance=tolerance)))
    longer = {name: {"flops": enough} for name in ("going_on", "grown")}
    check_comparable(make_plan(study(common=ROUNDED["common"], arms={**ROUNDED["arms"], **longer})))
    with pytest.raises(ConfigError, match="more than the tolerance 0 apart. Set a smaller"):
        check_comparable(make_plan(study(**ROUNDED, tolerance=0)))


def test_what_is_not_compared_may_differ(study):
    check_comparable(make_plan(study(arms={"grown": {"flops": 3e7, "comparable": False}})))
