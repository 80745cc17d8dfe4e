"""Values that replace those of the file: `section.field=value`."""

from __future__ import annotations

import pytest

from megatron_tf.config.sections.growth import Growth
from megatron_tf.errors import ConfigError


def test_overrides_reach_any_depth_and_later_ones_win(small):
    config = small("model.parameter_tokens.qkv=576", "run.seed=1", "run.seed=2", "optimizer.schedule.min_lr=6e-5")
    assert config.model.parameter_tokens.qkv == 576
    assert config.model.parameter_tokens.proj == 49
    assert config.run.seed == 2
    assert config.optimizer.schedule.min_lr == 6e-5


def test_override_creates_an_optional_section_and_null_removes_it(small):
    assert small("growth.from=runs/a", "growth.moments=reset").growth == Growth(source="runs/a", moments="reset")
    assert small("growth.from=runs/a", "growth=null").growth is None
    assert small("growth.from=runs/a", "growth=").growth is None


def test_override_takes_an_equals_sign_in_its_value(small):
    assert small("run.name=a=b").run.name == "a=b"


def test_override_takes_a_whole_section(small):
    assert small("parallel={tensor: 2, sequence: true}").parallel.sequence is True


@pytest.mark.parametrize("override", ["train_steps", "=3", "run.=3", ".run=3", "run..dir=x"])
def test_malformed_override_is_quoted(small, override):
    with pytest.raises(ConfigError, match=r"not of the form section\.field=value") as error:
        small(override)
    assert override in str(error.value)


def test_override_below_a_value_says_what_stands_there(small):
    with pytest.raises(ConfigError, match=r"override run\.dir\.x: run\.dir is the text 'runs/small' and has no keys"):
        small("run.dir.x=1")
    with pytest.raises(ConfigError, match=r"Give it as a whole: data\.train=\.\.\."):
        small("data.train.0.path=x")


def test_override_that_is_not_yaml_names_its_key(small):
    with pytest.raises(ConfigError, match=r"override data\.train: not a plain YAML document at line 1"):
        small("data.train=[")


def test_override_with_a_duplicate_key_is_refused(small):
    with pytest.raises(ConfigError, match=r"^parallel\.tensor: given twice in override parallel, both in line 1\."):
        small("parallel={tensor: 2, tensor: 4}")


def test_misspelt_override_suggests_the_key(small):
    with pytest.raises(ConfigError, match=r"training\.train_step: unknown key\. Did you mean training\.train_steps\?"):
        small("training.train_step=3")
    with pytest.raises(ConfigError, match=r"^trainin: unknown key\. Did you mean training\?"):
        small("trainin.train_steps=3")
