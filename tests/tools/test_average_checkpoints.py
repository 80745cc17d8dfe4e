"""The mean of checkpoints as a new run, and weights alone as a file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from launching import train
from prepared import write_tokens
from safetensors import safe_open
from tiny import run_config
from tooling import assert_refused, tool

from megatron_tf.checkpoint import load_logical
from megatron_tf.checkpoint.averaging import averaged
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.step_zero import write_weights
from megatron_tf.commands.average_checkpoints import open_sources
from megatron_tf.config.load import dump_config
from megatron_tf.errors import CheckpointError, UserError
from megatron_tf.model import build_model
from megatron_tf.state.parameters import initial_scales

MODEL = {**run_config().model.model_dump(), "parameter_tokens": {"qkv": 13, "proj": 11, "ffn": 75}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """config.yml, prepared data and the run `small` with checkpoints of steps 1 to 4."""
    folder = tmp_path_factory.mktemp("average")
    write_tokens(folder / "tokens")
    data = {"train": ({"path": str(folder / "tokens")},)}
    config = run_config(run={"dir": str(folder / "small")}, data=data, checkpoint={"interval_steps": 1},
                        training={"train_steps": 4})  # fmt: skip
    (folder / "config.yml").write_text(dump_config(config))
    done = train(folder, "optimizer.lr=0.1")
    assert done.returncode == 0, done.stdout
    return folder


def step(folder, number):
    return folder / "small" / "checkpoints" / f"step_{number:08d}"


def mean(folder, *steps):
    weights = [load_logical(step(folder, number)) for number in steps]
    return {name: torch.stack([w[name].double() for w in weights]).mean(0).float() for name in weights[0]}


def test_the_newest_of_a_run_are_averaged(folder, tmp_path):
    done = tool("average_checkpoints", folder / "small", "--last", 3, "--to", tmp_path / "mean")
    assert done.returncode == 0, done.stderr
    assert [line.split(", ")[1] for line in done.stdout.splitlines()[:3]] == ["step 4", "step 3", "step 2"]
    found, expected = load_logical(tmp_path / "mean"), mean(folder, 2, 3, 4)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    index = open_checkpoint(tmp_path / "mean" / "checkpoints" / "step_00000000").index
    assert (index.step, index.scales) == (0, open_checkpoint(step(folder, 4)).index.scales)


def test_a_step_that_an_interrupted_save_left_twice_counts_once(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "small", run)
    shutil.copytree(step(folder, 4), run / "checkpoints" / ".old-step_00000004-abcd")
    done = tool("average_checkpoints", run, "--last", 3, "--to", tmp_path / "mean")
    assert [line.split(", ")[1] for line in done.stdout.splitlines()[:3]] == ["step 4", "step 3", "step 2"], done.stderr


def test_fewer_than_were_asked_for_are_told(folder, tmp_path, here):
    done = here("average_checkpoints", folder / "small", "--last", 20, "--to", tmp_path / "mean", "--dry-run")
    assert done.returncode == 0 and "--last      20, and the run has only 4 checkpoints\n" in done.stdout
    done = here("average_checkpoints", folder / "small", "--last", 4, "--to", tmp_path / "mean", "--dry-run")
    assert done.returncode == 0 and "only" not in done.stdout


def test_named_checkpoints_are_averaged(folder):
    source, expected = averaged(open_sources([step(folder, 1), step(folder, 4)], 5)), mean(folder, 1, 4)
    for name, weight in expected.items():
        assert torch.equal(source.read(name, "weight", 0, weight.numel()), weight.reshape(-1))
        assert source.read(name, "exp_avg", 1, 3).tolist() == [0, 0]


def test_what_cannot_be_averaged_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"step_00000004: is one checkpoint, .*\(checkpoint.keep_last\)"):
        averaged(open_sources([step(folder, 4)], 5))
    with pytest.raises(CheckpointError, match="there is no such folder"):
        open_sources([tmp_path / "none"], 5)
    model = run_config(model=MODEL).model
    weights = dict(build_model(model).named_parameters())
    write_weights(tmp_path / "checkpoints", model, weights, initial_scales(model), lambda *_: None)
    with pytest.raises(CheckpointError, match="is of another model"):
        averaged(open_sources([folder / "small", tmp_path], 5))


def test_a_checkpoint_counts_once(folder, tmp_path):
    with pytest.raises(UserError, match=r"step_00000004: is given twice"):
        open_sources([step(folder, 4), step(folder, 3), folder / "small"], 5)
    done = tool("average_checkpoints", folder / "small", "--ema", "--last", 3, "--to", tmp_path / "none")
    assert_refused(done, "--ema and --last 3: one is of a single checkpoint")


def test_other_scales_are_refused(folder):
    readers = [open_checkpoint(step(folder, 3)), open_checkpoint(step(folder, 4))]
    readers[1].index.scales["blocks.1.ffn"] = 2.0
    with pytest.raises(CheckpointError, match=r"τ of blocks.1.ffn is 2, and 6.08276 in .* after the same growth"):
        averaged(readers)


def test_weights_alone_go_into_one_file(folder, tmp_path):
    done = tool("convert_checkpoint", "to-safetensors", folder / "small", "--to", tmp_path / "w.safetensors")
    assert done.returncode == 0, done.stderr
    weights = load_logical(folder / "small")
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert {*file.keys()} == {*weights}
        assert all(torch.equal(file.get_tensor(name), weight) for name, weight in weights.items())
        metadata = file.metadata()
    assert json.loads(metadata["model"])["parameter_tokens"] == {"qkv": 13, "proj": 11, "ffn": 37}
    assert json.loads(metadata["scales"])["blocks.0.ffn"] == pytest.approx(37**0.5) and metadata["step"] == "4"
    assert (tmp_path / "w.safetensors").stat().st_mode == (folder / "config.yml").stat().st_mode
