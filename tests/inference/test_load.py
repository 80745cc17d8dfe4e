"""Which run a checkpoint is of."""

from __future__ import annotations

import os

import pytest

from megatron_tf.config.load import dump_config, load_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.errors import ConfigError
from megatron_tf.inference.load import configured_tokenizer, run_config


@pytest.fixture
def run(tmp_path):
    """A run's folder with a config.yml, and a folder that stands for its checkpoint."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    config = RunConfig.model_validate(
        {"run": {"dir": str(tmp_path / "run")}, "optimizer": {"lr": 1e-3},
         "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16, "vocab_size": 300,
                   "parameter_tokens": {"qkv": 8, "proj": 8, "ffn": 8}},
         "training": {"train_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
         "data": {"tokenizer": "bytes", "train": ({"path": "unused"},)}}
    )  # fmt: skip
    (tmp_path / "run" / "config.yml").write_text(dump_config(config))
    return tmp_path / "run", checkpoint


def test_the_configuration_is_around_the_checkpoint(run, monkeypatch):
    folder, checkpoint = run
    config = load_config(folder / "config.yml")
    for path in (folder, checkpoint.parent, checkpoint, str(checkpoint)):
        assert run_config(path) == config and configured_tokenizer(path) == "bytes"
    monkeypatch.chdir(checkpoint)
    assert run_config(".") == config
    assert run_config(folder.parent / "elsewhere") is None


@pytest.mark.parametrize("moved", ["step_00000010", "checkpoints"])
def test_it_is_found_when_the_checkpoint_is_a_link_and_from_where_it_lies(run, tmp_path, moved):
    folder, checkpoint = run
    place = checkpoint if moved == checkpoint.name else checkpoint.parent
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert configured_tokenizer(checkpoint) == "bytes"
    (tmp_path / "round").symlink_to("round")
    assert configured_tokenizer(tmp_path / "round") is None
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "straight").symlink_to(checkpoint)
    assert configured_tokenizer(tmp_path / "link") == "bytes"
    assert configured_tokenizer(tmp_path / "straight") == "bytes"


def test_one_that_cannot_be_read_is_refused_by_name(run):
    folder, checkpoint = run
    (folder / "config.yml").unlink()
    os.mkfifo(folder / "config.yml")
    with pytest.raises(ConfigError, match="config.yml: is a FIFO, where a file is expected"):
        run_config(checkpoint)
    (folder / "config.yml").unlink()
    (folder / "config.yml").symlink_to("gone")
    with pytest.raises(ConfigError, match="config.yml: is a link to gone, and nothing is there"):
        run_config(checkpoint)
