"""train --dry-run: what a run would do, and what would stop it; nothing is written."""

from __future__ import annotations

import sys

import pytest
from launching import TRAIN, run
from prepared import write_tokens
from tiny import run_config

from megatron_tf.checkpoint.step_zero import write_weights
from megatron_tf.config.load import dump_config
from megatron_tf.errors import CheckpointError, ConfigError, DataError
from megatron_tf.model import build_model
from megatron_tf.state.parameters import initial_scales
from megatron_tf.training.dry_run import dry_run


@pytest.fixture
def config(tmp_path):
    """config(section={...}) is the tiny run in a folder with data."""
    write_tokens(tmp_path / "tokens")
    data = {"train": ({"path": str(tmp_path / "tokens")},)}

    def make(name="run", **changes):
        return run_config(**{"run": {"dir": str(tmp_path / name)}, "data": data, **changes})

    return make


def lines(*stages, world_size=1):
    return "\n".join(dry_run(stages, world_size)).splitlines()


def test_a_fresh_run_is_shown_with_its_first_batch(config):
    found = lines(config(), world_size=2)
    assert [line.split()[0] for line in found[:6]] == ["run", "model", "layout", "step", "length", "memory"]
    assert "2 ranks as TP1×PP1×DP2" in found[2]
    assert "initial weights of seed 7" in found
    assert "batch   micro batch of step 1 on a rank: inputs [2, 16], targets [2, 16], 32 of 32 losses count" in found
    assert found[-1] == "dry run: nothing was written"


@pytest.mark.parametrize("inside", ["", "/run", "/a/b"])
def test_a_folder_that_cannot_be_made(config, tmp_path, inside):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.dir: .* cannot be made: .*/file is a file\. Choose another folder"):
        lines(config(f"file{inside}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "tokens.bin", "tokens.idx"]


def test_a_folder_of_the_system_is_refused_as_the_run_does(config):
    with pytest.raises(ConfigError, match=r"run\.dir: /proc/x cannot be made: /proc "):
        lines(config(run={"dir": "/proc/x"}))


def test_a_growth_opens_its_source(config, tmp_path):
    small = config()
    model = build_model(small.model)
    weights = dict(model.named_parameters())
    write_weights(
        tmp_path / "small" / "checkpoints", small.model, weights, initial_scales(small.model), lambda *_: None
    )
    tokens = {**small.model.model_dump(), "parameter_tokens": {"qkv": 26, "proj": 22, "ffn": 74}}
    growth = {"from": str(tmp_path / "small")}
    grown = config("grown", model=tokens, growth=growth)
    found = lines(grown, config("later", model=tokens))
    assert any("grown from" in line and "by zero_key" in line for line in found)
    assert found.count("") == 1 and found[-8].startswith(f"run     tokenformer in {tmp_path}/later")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "tokens.bin", "tokens.idx"]
    with pytest.raises(CheckpointError):
        lines(config("other", growth={"from": str(tmp_path / "absent")}))
    with pytest.raises(ConfigError):
        lines(config("other", growth=growth))


def test_masked_labels_and_missing_data(config, tmp_path):
    data = {"train": ({"path": str(tmp_path / "tokens")},), "pad_id": 1}
    batch = next(line for line in lines(config(data=data)) if line.startswith("batch"))
    assert 0 < int(batch.split()[-5]) < 32, batch
    with pytest.raises(DataError):
        lines(config(data={"train": ({"path": str(tmp_path / "absent")},)}))


def test_the_command_shows_it_and_exits_with_0(config, tmp_path):
    (tmp_path / "config.yml").write_text(dump_config(config()))
    done = run([sys.executable, TRAIN, tmp_path / "config.yml", "--dry-run"])
    assert done.returncode == 0 and done.stdout.endswith("losses count\ndry run: nothing was written\n"), done.stdout
    assert not (tmp_path / "run").exists()
