from __future__ import annotations

import pytest

from megatron_tf.config.load import load_config
from megatron_tf.config.stages import load_stages
from megatron_tf.config.yaml_core import dump_yaml
from megatron_tf.errors import ConfigError


@pytest.fixture
def chain(tmp_path, values):
    """chain(stage, ...) is the path of a chain of these stages."""

    def write(*stages, **common):
        path = tmp_path / "chain.yml"
        path.write_text(dump_yaml({**values, **common, "stages": list(stages)}))
        return path

    return write


SMALL = {"name": "small"}
BIG = {
    "name": "big",
    "model": {"parameter_tokens": {"qkv": 96, "proj": 98, "ffn": 380}},
    "training": {"train_steps": 50},
    "parallel": {"tensor": 2},
}


def test_an_ordinary_file_is_a_chain_of_one(small_path):
    assert load_stages(small_path, ["run.seed=7"]) == [load_config(small_path, ["run.seed=7"])]


def test_stages_are_runs_that_grow_from_each_other(chain):
    first, second, third = load_stages(chain(SMALL, BIG, {"name": "again"}, growth={"moments": "reset"}))
    assert [stage.run.dir for stage in (first, second, third)] == [f"runs/small/{n}" for n in ("small", "big", "again")]
    assert first.growth is None
    assert (second.growth.source, second.growth.moments) == ("runs/small/small", "reset")
    assert third.growth.source == "runs/small/big"
    # what a stage does not name is the common value, also within a section
    assert (second.training.train_steps, second.training.global_batch_size) == (50, 16)
    assert (first.parallel.tensor, second.parallel.tensor, third.parallel.tensor) == (1, 2, 1)


def test_overrides_are_for_all_stages_or_for_one(chain):
    path = chain(SMALL, BIG)
    first, second = load_stages(path, ["training.train_steps=5", "stages.big.training.global_batch_size=32"])
    assert (first.training.train_steps, second.training.train_steps) == (5, 5)
    assert (first.training.global_batch_size, second.training.global_batch_size) == (16, 32)
    with pytest.raises(ConfigError, match="no such stage. The stages are small, big"):
        load_stages(path, ["stages.huge.training.train_steps=5"])


def test_the_first_stage_may_grow_from_another_run(chain):
    first, second = load_stages(chain({**SMALL, "growth": {"from": "runs/tiny"}}, BIG))
    assert (first.growth.source, second.growth.source) == ("runs/tiny", "runs/small/small")
    path = chain(SMALL, BIG, growth={"method": "gram"})
    first, second = load_stages(path, ["stages.small.growth.from=runs/tiny", "growth.moments=reset"])
    assert (first.growth.source, first.growth.method, first.growth.moments) == ("runs/tiny", "gram", "reset")
    assert second.growth.moments == "reset"
    first, second = load_stages(path, ["growth.method=zero_key"])
    assert first.growth is None and second.growth.method == "zero_key"


def test_one_name_may_be_the_beginning_of_another(chain):
    path = chain({**SMALL, "name": "1"}, {**BIG, "name": "1.5B"})
    first, second = load_stages(path, ["stages.1.5B.optimizer.lr=0.25", "stages.1.optimizer.lr=0.5"])
    assert (first.optimizer.lr, second.optimizer.lr) == (0.5, 0.25)


@pytest.mark.parametrize(
    "stages, message",
    [
        ([], "stages: not a list of stages"),
        ([{"model": {}}], r"stages\[0\].name: None is not a name"),
        ([{"name": "../up"}], r"stages\[0\].name: '../up' is not a name"),
        ([{"name": 192}], r"stages\[0\].name: 192 is not a name. Write it in quotes"),
        (
            [SMALL, {**BIG, "growth": {"from": "runs/x"}}],
            "stage big: growth.from: a stage grows from the one before it",
        ),
        ([SMALL, SMALL], r"stages\[1\].name: small is there twice"),
        ([SMALL, {**BIG, "modle": {}}], "stage big: modle"),
    ],
)
def test_bad_stages(chain, stages, message):
    with pytest.raises(ConfigError, match=message):
        load_stages(chain(*stages))


def test_a_chain_is_not_one_run(chain):
    with pytest.raises(ConfigError, match="a chain is for launch/train.py"):
        load_config(chain(SMALL, BIG))


@pytest.mark.parametrize("override", ["stages=[]", "stages.big=3"])
def test_a_whole_stage_is_no_override(chain, override):
    with pytest.raises(ConfigError, match="changed one value at a time"):
        load_stages(chain(SMALL, BIG), [override])


def test_a_stage_grows_from_the_folder_that_the_variables_give(chain, monkeypatch):
    monkeypatch.setenv("PRICE", "5$HOME")
    first, second = load_stages(chain(SMALL, BIG), ["run.dir=$PRICE"])
    assert first.run.dir == second.growth.source == "5$HOME/small"


def test_only_the_first_stage_begins_with_weights_from_elsewhere(chain, values):
    path = chain(SMALL, BIG, training={**values["training"], "init_from": "runs/tiny"})
    for overrides, source in (([], "runs/tiny"), (["training.init_from=runs/other"], "runs/other")):
        first, second = load_stages(path, overrides)
        assert (first.training.init_from, second.training.init_from) == (source, None)
        assert second.growth.source == "runs/small/small"
    assert load_stages(path, ["stages.big.training.init_from=x"])[1].training.init_from == "x"  # which validate refuses


DELIVER = {"decay": 0.2}


def test_a_chain_that_delivers_its_sizes(chain):
    """Each ends with a decay over a share of its own steps, and the next one grows from before it."""
    path = chain(SMALL, {**BIG, "deliver": {"decay": 0.5}}, {"name": "again"}, deliver=DELIVER)
    small, big, again = load_stages(path)
    for stage, decay in ((small, 20), (big, 25), (again, 20)):
        schedule = stage.optimizer.schedule
        assert (schedule.type, schedule.decay_steps, stage.checkpoint.keep_before_decay) == ("wsd", decay, True)
    assert small.growth is None
    assert (big.growth.source, big.growth.at, again.growth.at) == ("runs/small/small", "before_decay", "before_decay")
    small, *_ = load_stages(path, ["stages.small.deliver.decay=0.001", "optimizer.schedule.type=cosine"])
    assert (small.optimizer.schedule.type, small.optimizer.schedule.decay_steps) == ("wsd", 1)


def test_a_stage_that_is_not_delivered_is_grown_from_its_end(chain):
    small, big, again = load_stages(chain({**SMALL, "deliver": None}, BIG, {"name": "again"}, deliver=DELIVER))
    assert small.optimizer.schedule.type == "cosine" and not small.checkpoint.keep_before_decay
    assert (big.growth.at, again.growth.at) == ("end", "before_decay")
    assert [stage.growth for stage in load_stages(chain(SMALL), ["deliver.decay=0.1"])] == [None]


@pytest.mark.parametrize("given", [0.2, {}, {"decay": 0}, {"decay": 1}, {"decay": "0.2"}, {"decay": 0.2, "at": "end"}])
def test_a_share_that_is_none(chain, given):
    with pytest.raises(ConfigError) as caught:
        load_stages(chain(SMALL, BIG, deliver=given))
    (problem,) = caught.value.problems
    assert problem.startswith(f"stage small: deliver: {given!r} does not say how long the decay")
    assert "deliver: {decay: 0.2}, a share of the stage's steps above 0 and below 1" in problem


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.big.growth.at=end", "stage big: growth.at: end, but with deliver a stage grows from before the decay"),
        ("optimizer.schedule.decay_steps=5", "optimizer.schedule.decay_steps: 5, but deliver says how long"),
        ("stages.big.checkpoint.keep_before_decay=false", "stage big: checkpoint.keep_before_decay: false, but with"),
        ("stages.big.optimizer.schedule.warmup_steps=41",
         "stage big: deliver: a decay of 0.2 of 50 steps is 10 steps, and optimizer.schedule.warmup_steps is 41: "
         "together more than the stage has"),
        ("optimizer.schedule=5", "optimizer.schedule: the number 5, but a section with keys is expected"),
    ],
)  # fmt: skip
def test_what_contradicts_a_delivery(chain, override, message):
    with pytest.raises(ConfigError) as caught:
        load_stages(chain(SMALL, BIG, deliver=DELIVER), [override])
    assert len(caught.value.problems) == 1 and message in caught.value.problems[0]


def test_only_a_chain_delivers(tmp_path, values):
    path = tmp_path / "one.yml"
    path.write_text(dump_yaml({**values, "deliver": DELIVER}))
    with pytest.raises(ConfigError, match="deliver: is for a chain, and this file has no stages"):
        load_stages(path)
