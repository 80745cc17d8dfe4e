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
