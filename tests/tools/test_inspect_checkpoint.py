from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tooling import tool

from megatron_tf.checkpoint.compare import StateDifference
from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors, shard_name
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.summary import summarize
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.commands.inspect_checkpoint import over_blocks, print_summary
from megatron_tf.config.sections.model import Model
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.state.parameters import initial_scales, parameter_table

TOOL = Path(__file__).parents[2] / "tools" / "inspect_checkpoint.py"
MODEL = Model.model_validate(
    {
        "num_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "seq_length": 16,
        "vocab_size": 32,
        "parameter_tokens": {"qkv": 4, "proj": 4, "ffn": 16},
    }
)


SPARSE = MODEL.model_validate({**MODEL.model_dump(), "sparse": {"ffn": {"group_size": 16, "candidates": 4}}})


def save(root: Path, step: int, value: float, model: Model = MODEL) -> Path:
    table = parameter_table(model)
    index = CheckpointIndex(
        step=step,
        samples=8 * step,
        tokens=128 * step,
        model=model.model_dump(),
        scales=initial_scales(model),
        tensors=expected_tensors({name: spec.shape for name, spec in table.items()}),
        adam_steps={
            name: ((0, 8, step), (8, s.numel, 1)) if s.numel > 8 else ((0, s.numel, step),) for name, s in table.items()
        },
        growth_history=({"method": "zero_key", "from": {"ffn": 8}, "to": {"ffn": 16}},),
        run={
            "history": [
                {"event": "weights taken", "step": 3, "tokens": 384, "source": "runs/a"},
                {"event": "resumed", "step": 10, "tokens": 1280, "changes": {"optimizer.lr": ["0.1", "0.2\x1b[2J"]}},
            ]
        },
    )
    pieces = []
    for name, spec in table.items():
        for state in STATES:
            tensor = torch.zeros(spec.numel)
            if name == "final_norm.bias" and state == "exp_avg":
                tensor[2] = value
            pieces.append(Piece(name, state, 0, spec.numel, tensor))
    return save_checkpoint(root, pieces, index, rank=0, world_size=1, token="t")


def inspect(*arguments) -> subprocess.CompletedProcess:
    return tool("inspect_checkpoint", *arguments)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("run")
    save(root / "checkpoints", 10, 0.0)
    save(root / "checkpoints", 20, 0.25)
    return root


def test_the_table_shows_what_is_inside(run_folder):
    done = inspect(run_folder, "--verify")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for line in (
        "hidden_size 8",
        "step 20",
        "tokens 2,560",
        "attention.query 2",
        "ffn 4",
        "method zero_key",
        "weights taken, step 3",
        "source runs/a",
        "resumed, step 10",
        r"optimizer.lr 0.1 -> 0.2\x1b[2J",
        "embedding.weight [32, 8] weight, exp_avg, exp_avg_sq 3,072 1 to 20",
        "final_norm.bias [8] weight, exp_avg, exp_avg_sq 96 20",
        "verified: 2 files, every checksum and range is right",
    ):
        assert line in lines, done.stdout


def test_how_many_parameters_a_position_uses(run_folder, tmp_path):
    path = save(tmp_path, 10, 0.0, SPARSE)
    unused = 3 * 2 * 2 * 16 * 8  # candidates · keys and values · layers · tokens · width
    content = json.loads(inspect(path, "--json").stdout)
    assert content["parameters"] - content["used_parameters"] == unused
    words = f"parameters  {content['parameters']:,}, of which a position uses {content['used_parameters']:,}\n"
    assert words in inspect(path).stdout
    content = json.loads(inspect(run_folder, "--json").stdout)
    assert content["parameters"] == content["used_parameters"]
    assert f"parameters  {content['parameters']:,}\n" in inspect(run_folder).stdout


@pytest.mark.parametrize("change", [{"num_layers": 10**9}, {"num_layers": 1}, {"hidden_size": 6}, {"sparse": "none"}])
def test_a_model_section_that_is_not_that_of_the_tensors_leaves_the_used_parameters_open(change, tmp_path, capsys):
    reader = open_checkpoint(save(tmp_path, 10, 0.0, SPARSE))
    reader.index = replace(reader.index, model={**reader.index.model, **change})
    summary = summarize(reader)
    assert summary["used_parameters"] is None
    print_summary(reader, summary)
    assert f"parameters  {summary['parameters']:,}\n" in capsys.readouterr().out


def test_json_holds_the_same(run_folder):
    done = inspect(run_folder / "checkpoints" / "step_00000010", "--json", "--verify", "--diff", run_folder)
    content = json.loads(done.stdout)
    assert (content["step"], content["tokens"], content["verified_files"]) == (10, 1280, 2)
    assert content["tensors"]["final_norm.bias"]["shape"] == [8]
    assert [(d["name"], d["state"], d["unequal"], d["largest"]) for d in content["differences"]] == [
        ("final_norm.bias", "exp_avg", 1, 0.25)
    ]


def test_diff_names_the_tensor_and_exits_1(run_folder):
    done = inspect(run_folder, "--diff", run_folder / "checkpoints" / "step_00000010")
    assert done.returncode == 1 and done.stderr == ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "final_norm.bias exp_avg [8] / [8] 1 of 8 0.25" in lines


def test_diff_of_equal_checkpoints_exits_0(run_folder):
    done = inspect(run_folder, "--diff", run_folder)
    assert done.returncode == 0
    assert "every tensor and state is equal to the last bit" in done.stdout


@pytest.mark.parametrize("change", ["scales", "rotary_base"])
def test_equal_tensors_of_other_functions_are_a_difference(run_folder, tmp_path, change):
    """τ and keys of the model decide what the tensors compute."""
    reader = open_checkpoint(run_folder / "checkpoints" / "step_00000010")
    model = {**reader.index.model, "rotary_fraction": 0.5}
    index = replace(reader.index, model=model, growth_history=())
    other = replace(index, model={**index.model, "rotary_base": 500.0})
    if change == "scales":
        name = next(iter(index.scales))
        other = replace(index, scales={**index.scales, name: 2 * index.scales[name]})
    pieces = [
        Piece(name, state, 0, tensor.numel, reader.read(name, state, 0, tensor.numel))
        for name, tensor in index.tensors.items()
        for state in tensor.states
    ]
    for folder, own in ("one", index), ("other", other):
        save_checkpoint(tmp_path / folder / "checkpoints", pieces, own, rank=0, world_size=1, token="t")
    done = inspect(tmp_path / "one", "--diff", tmp_path / "other")
    assert done.returncode == 1 and "but for the above there is no difference" in done.stdout, done.stdout
    assert ("τ differ" if change == "scales" else "model.rotary_base") in done.stdout


def test_a_damaged_checkpoint_is_one_message_and_exit_code_2(tmp_path):
    path = save(tmp_path, 10, 0.0)
    content = bytearray((path / shard_name(0)).read_bytes())
    content[-1] ^= 1
    (path / shard_name(0)).write_bytes(content)
    assert inspect(path).returncode == 0
    done = inspect(path, "--verify")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "shard_00000.safetensors is damaged" in done.stderr
    assert done.stderr.count("The checkpoint is damaged: copy it again, or use an older one") == 1
    assert "Traceback" not in done.stderr
    whole = save(tmp_path / "whole", 10, 0.0)
    assert inspect(whole, "--diff", path).returncode == 1
    done = inspect(whole, "--diff", path, "--verify")
    assert done.returncode == 2 and f"{path}: shard_00000.safetensors is damaged" in done.stderr


def test_a_newer_one_that_is_damaged_is_no_success(tmp_path):
    save(tmp_path / "checkpoints", 10, 0.0)
    newest = save(tmp_path / "checkpoints", 20, 0.25)
    (newest / "manifest.json").unlink()
    done = inspect(tmp_path, "--verify")
    assert done.returncode == 2 and "verified: 2 files" in done.stdout, done.stdout
    assert f"error: newer checkpoints are damaged:\n  - {newest}: has no manifest.json" in done.stderr
    assert done.stderr.endswith("Copy them again, or move them away.\n")
    done = inspect(tmp_path)
    assert done.returncode == 0 and "taken in its place" in done.stderr


def test_remedies(tmp_path):
    path = save(tmp_path, 10, 0.0)
    shard = path / shard_name(0)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    remedy = "The checkpoint is damaged: copy it again, or use an older one"
    done = inspect(path)
    assert f"has {len(content) - 1} bytes, the manifest says {len(content)}. {remedy}.\n" in done.stderr
    shard.unlink()
    assert f"{shard_name(0)} is missing. {remedy}.\n" in inspect(path).stderr
    done = inspect(tmp_path)
    assert f"{shard_name(0)} is missing\nCopy them again, or give another folder.\n" in done.stderr
    (tmp_path / "empty").mkdir()
    assert "holds no complete checkpoint. Give the folder of a run that has" in inspect(tmp_path / "empty").stderr
    assert f"{TOOL}: is a file. Give a checkpoint" in inspect(TOOL).stderr
    done = inspect("")
    assert done.returncode == 2 and "argument path: '' is no path" in done.stderr


def test_a_missing_checkpoint_is_one_message_and_exit_code_2(tmp_path):
    done = inspect(tmp_path / "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and "there is no such folder" in done.stderr


def test_an_export_is_named_as_one(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert f"{tmp_path}: is an export, not a checkpoint. Its config.json says" in inspect(tmp_path).stderr


def test_it_needs_neither_deepspeed_nor_the_model(run_folder):
    script = (
        "import runpy, sys; sys.argv = ['x', sys.argv[1], '--verify']; "
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__'); "
        "assert not {'deepspeed', 'megatron_tf.model'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(run_folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_differences_that_blocks_have_in_common_are_one_row():
    def keys(block, unequal, largest, rows=4):
        return StateDifference(f"blocks.{block}.ffn.key_tokens", "weights", ((4, 8), (rows, 8)), 32, unequal, largest)

    norm = StateDifference("final_norm", "weights", ((8,), (8,)), 8, 1, 0.5)
    found = over_blocks([keys(0, 1, 2.0), keys(1, 3, 4.0), norm, keys(3, 1, 1.0), keys(4, 1, math.nan, 5)])
    assert [(d.name, d.compared, d.unequal, d.largest) for d in found[:2]] == [
        ("blocks.0-1,3.ffn.key_tokens", 96, 5, 4.0),
        ("final_norm", 8, 1, 0.5),
    ]
    # Other shapes are another row, and a NaN is not hidden by numbers.
    assert found[2].name == "blocks.4.ffn.key_tokens"
    assert math.isnan(over_blocks([keys(0, 1, 2.0), keys(1, 1, math.nan), keys(2, 1, 3.0)])[0].largest)
