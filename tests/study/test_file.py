from __future__ import annotations

import pytest
from study_names import problems_of


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"arms": {"small": {"parent": "grown", "seeds": None}}},
            "arms small -> grown -> small: each starts from the next",
        ),
        (
            {"arms": {"grown": {"parent": "smal"}}},
            "arm grown: parent: there is no arm smal. The arms are small, going_on",
        ),
        ({"arms": {"grown": {"value_of": "smal"}}}, "arm grown: value_of: there is no arm smal"),
        (
            {"arms": {"grown": {"value_of": "going_on"}}},
            "arm grown: value_of: takes what a sweep of going_on has chosen",
        ),
        ({"arms": {"small": {"value_of": "grown"}}}, "arms small -> grown -> small: each starts from the next"),
        ({"arms": {"grown": {"name": "going_on"}}}, "arm going_on: is there twice"),
        ({"arms": {"grown": {"tokens": 5.0}}}, "arm grown: both flops (2e+07) and tokens (5) are given"),
        ({"arms": {"grown": {"flops": None}}}, "arm grown: decay 0.2 is a share of flops or tokens, and neither"),
        ({"arms": {"grown": {"seeds": [2, 3]}}}, "arm grown: seeds [3] start from the parent's runs"),
        ({"arms": {"grown": {"seeds": [2, 2]}}}, "arm grown: seeds: [2, 2] has one twice"),
        ({"arms": {"going_on": {"parent": None}}}, "arm going_on: by branch, but it has no parent"),
        ({"arms": {"going_on": {"config": "tiny"}}}, "a branch has the configuration of its parent"),
        ({"arms": {"grown": {"flop": 1.0}}}, "arm grown: flop: unknown key. The keys here are name, config"),
        ({"arms": {"grown": {"flop": 1.0}}}, ", family. Did you mean flops?"),
        (
            {"arms": {"grown": {"by": "branc"}}},
            "arm grown: by: the text 'branc', but one of growth, branch is expected.",
        ),
        ({"arms": {"grown": {"parent": "smal"}}}, "The arms are small, going_on, grown. Did you mean small?"),
        ({"reference": "grow"}, "The arms are small, going_on, grown. Did you mean grown?"),
        ({"arms": {"grown": {"model": {}}}}, "arm grown: model: is a section of a run's configuration, and this is"),
        (
            {"arms": {"small": {"sweep": {"key": "optimiser.lr", "values": [1.0, 2.0]}}}},
            "arm small: sweep.key: optimiser.lr: unknown key. Give one of a configuration, such as optimizer.lr.",
        ),
        (
            {"arms": {"small": {"sweep": {"key": "lr", "values": [1.0, 2.0]}}}},
            "such as optimizer.lr. Did you mean optimizer.lr?",
        ),
        (
            {"arms": {"small": {"sweep": {"key": "optimizer.lr", "values": [1.0, 2.0], "extends": 1}}}},
            "arm small: sweep.extends: unknown key. The keys here are key, values, flops, extend. Did you mean extend?",
        ),
        ({"common": {"optimizer": {"lrr": 1}}}, "common: optimizer.lrr: unknown key. Did you mean optimizer.lr?"),
        ({"common": {"extends": "tiny"}}, "common.extends: 'tiny', but only a file extends another."),
        (
            {"arms": {"grown": {"extends": "tiny"}}},
            "family. No part of a study extends a file: write one as the config",
        ),
        ({"extends": "tiny"}, "study.yml: extends: 'tiny', but a study extends no file."),
        (
            {"arms": {"small": {"sweep": {"key": "a", "values": [1.0]}}}},
            "arm small: sweep.values: the list has 1 item. It needs at least 2.",
        ),
        (
            {"arms": {"small": {"sweep": {"key": "a", "values": ["fast", 1.0]}}}},
            "sweep.values[0]: the text 'fast', but a number",
        ),
        ({"training": {}}, "training: is a section of a run's configuration, and this is read as a study"),
        ({"arms": {"small": {"sweep": {"key": "a", "values": [1.0, 1.0]}}}}, "sweep.values: [1.0, 1.0] has one twice"),
        (
            {"arms": {"small": {"sweep": {"key": "a", "values": [1.0, 1.0000001]}}}},
            "sweep.values: [1.0, 1.0000001] has one twice, to 6 digits",
        ),
        ({"arms": {"grown": {"name": "a b"}}}, "arm a b: name: the text 'a b' is not valid: must be letters"),
        ({"reference": "nobody"}, "reference: there is no arm nobody"),
        ({"reference": "small"}, "reference: small is not comparable"),
        ({"seeds": []}, "seeds: the list has 0 items. It needs at least 1."),
        ({"arms": {"grown": {"flops": -7e10}}}, "arm grown: flops: -7e+10 is out of range. It must be greater than 0."),
        ({"tolerance": 2.0}, "tolerance: 2.0 is out of range. It must be"),
        ({"arm": []}, "arm: unknown key. The keys here are name, dir, seeds"),
        ({"arms": {"grown": {"decay": 1.0}}}, "arm grown: decay: 1.0 is out of range. It must be less than 1."),
    ],
)
def test_what_is_refused(study, changes, problem):
    found = problems_of(lambda: study(**changes))
    assert any(problem in text for text in found), found


def test_a_circle_is_told_once(study):
    assert len(problems_of(lambda: study(arms={"small": {"parent": "grown"}}))) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seeds": [1, 1]}, "seeds: [1, 1] has one twice, and one run would count as two. Give it once."),
        # the second small has no parent of that name that it could start from
        ({"arms": {"going_on": {"name": "small"}}}, "arm small: is there twice. Give each arm a name of its own."),
    ],
)
def test_a_fault_is_told_once(study, changes, problem):
    assert problems_of(lambda: study(**changes)) == [problem]


def test_overrides(write):
    from megatron_tf.study.file import load_study

    assert load_study(write(), ["dir=elsewhere", "seeds=[7]"]).dir == "elsewhere"
