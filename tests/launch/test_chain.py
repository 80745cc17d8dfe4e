"""A chain of growth stages by one command, interrupted and resumed anywhere."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from launching import train
from prepared import write_tokens

from megatron_tf.checkpoint import load_logical
from megatron_tf.checkpoint.reader import open_checkpoint

STAGES = """
stages:
  - name: small
  - name: middle
    model: {parameter_tokens: {qkv: 19, ffn: 61}}
    parallel: {tensor: 2}
    training: {train_steps: 4, global_batch_size: 4}
  - name: big
    model: {parameter_tokens: {qkv: 29, proj: 17, ffn: 90}}
    parallel: {tensor: 1, pipeline: 2}
    optimizer: {lr: 5e-3}
"""


@pytest.fixture
def chain(folder):
    config = folder / "config.yml"
    config.write_text(config.read_text() + STAGES)
    return folder


def stage_steps(folder, run, stage):
    records = [json.loads(line) for line in (folder / run / stage / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "train/loss" in record]


# (stage, checkpoint that is lost): in the middle of a stage, at its end before the next has saved, and at the very end
CUTS = [("middle", "step_00000004"), ("big", ""), ("big", "step_00000006")]


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [CUTS[:1], pytest.param(CUTS[1:], marks=pytest.mark.scale)])
def test_a_chain_on_three_layouts_resumes_anywhere(chain, cuts):
    whole = train(chain, f"run.dir={chain}/whole", ranks=2)
    assert whole.returncode == 0, whole.stdout
    assert [stage_steps(chain, "whole", stage)[-1] for stage in ("small", "middle", "big")] == [6, 4, 6]
    index = open_checkpoint(chain / "whole" / "big" / "checkpoints" / "step_00000006").index
    assert [entry["to"]["ffn"] for entry in index.growth_history] == [61, 90]
    assert index.tokens == (6 * 8 + 4 * 4 + 6 * 8) * 16
    assert all(entry["loss_before"] == pytest.approx(entry["loss_after"]) for entry in index.growth_history)

    for stage, lost in cuts:
        run = chain / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(chain / "whole", run)
        shutil.rmtree(run / stage / "checkpoints" / lost)
        if stage == "middle":
            shutil.rmtree(run / "big")
        for config in run.glob("*/config.yml"):
            config.unlink()
        resumed = train(chain, ranks=2)
        assert resumed.returncode == 0, resumed.stdout
        assert resumed.stdout.count("step 6/6") == 1  # stages that are complete are not run again
        assert stage_steps(chain, "run", "big") == [1, 2, 3, 4, 5, 6]
        one, other = load_logical(run / "big"), load_logical(chain / "whole" / "big")
        assert all(torch.equal(one[name], other[name]) for name in one)


DEEPER = """
stages:
  - name: small
    training: {train_steps: 2}
  - name: wide
    model: {parameter_tokens: {qkv: 19, ffn: 61}}
    training: {train_steps: 2}
    parallel: {tensor: 2}
  - name: deep
    model: {num_layers: 5, parameter_tokens: {qkv: 19, ffn: 61}}
    growth: {lr_multipliers: {new_layers: 0.5}}
    training: {train_steps: 4}
    parallel: {pipeline: 2}
  - name: big
    model: {num_layers: 5, parameter_tokens: {qkv: 29, proj: 17, ffn: 90}}
    training: {train_steps: 2}
    parallel: {tensor: 2}
"""


@pytest.mark.slow
def test_a_chain_of_tokens_depth_and_tokens_resumes(folder):
    config = folder / "config.yml"
    config.write_text(config.read_text() + DEEPER)
    whole = train(folder, "checkpoint.interval_steps=2", "logging.interval_steps=1", ranks=2)
    assert whole.returncode == 0, whole.stdout
    assert "2 -> 5 layers by identity" in whole.stdout
    records = [json.loads(line) for line in (folder / "run" / "deep" / "metrics.jsonl").read_text().splitlines()]
    rates = [record for record in records if "optim/lr_new_layers" in record]
    assert rates and all(r["optim/lr_new_layers"] == pytest.approx(r["optim/lr"] / 2) for r in rates)
    newest = folder / "run" / "big" / "checkpoints" / "step_00000002"
    expected, index = load_logical(newest), open_checkpoint(newest).index
    assert all(entry["loss_before"] == pytest.approx(entry["loss_after"]) for entry in index.growth_history)
    assert [entry["method"] for entry in index.growth_history] == ["zero_key", {}, "zero_key"]
    assert index.growth_history[1]["layers"] == {"method": "identity", "from": 2, "to": 5, "old_at": [0, 3]}
    # a layer of the start, tokens of the second stage in it, a layer of the third stage, tokens of the last one in that
    width = index.tensors["final_norm.bias"].shape[0]
    old, new = (index.adam_steps[f"blocks.{layer}.ffn.key_tokens"] for layer in (3, 1))
    assert [steps for *_, steps in old] == [10, 8, 2] and [steps for *_, steps in new] == [6, 2]
    assert old[1][1] == new[0][1] == 61 * width

    # cut off within the deeper stage, and gone on with the learning rates of its own
    shutil.rmtree(folder / "run" / "deep" / "checkpoints" / "step_00000004")
    shutil.rmtree(folder / "run" / "big")
    resumed = train(folder, "checkpoint.interval_steps=2", "logging.interval_steps=1", ranks=2)
    assert resumed.returncode == 0, resumed.stdout
    again = load_logical(newest)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


DELIVERED = """
deliver: {decay: 0.34}
stages:
  - name: small
  - name: big
    model: {parameter_tokens: {qkv: 19, ffn: 61}}
    optimizer: {schedule: {warmup_steps: 0}}
"""


def rates(folder, stage):
    records = [json.loads(line) for line in (folder / "run" / stage / "metrics.jsonl").read_text().splitlines()]
    return [record["optim/lr"] for record in records if "optim/lr" in record]


@pytest.mark.slow
def test_a_chain_delivers_each_size_and_grows_from_before_its_decay(folder):
    config = folder / "config.yml"
    config.write_text(config.read_text() + DELIVERED)
    done = train(folder)
    assert done.returncode == 0, done.stdout
    assert rates(folder, "small") == pytest.approx([0, 5e-3, 1e-2, 1e-2, 1e-2, 5e-3])
    # the rate goes on as it was before that decay, and decays at the end of this stage as well
    assert rates(folder, "big") == pytest.approx([1e-2] * 5 + [5e-3])
    small, big = (folder / "run" / stage / "checkpoints" / "step_00000006" for stage in ("small", "big"))
    index = open_checkpoint(big).index
    (entry,) = index.growth_history
    assert (entry["step"], entry["tokens"], index.tokens) == (4, 4 * 8 * 16, 10 * 8 * 16)
    assert entry["loss_before"] == pytest.approx(entry["loss_after"])
    expected = [load_logical(path) for path in (small, big)]

    # cut off within the decay of the first stage
    shutil.rmtree(small)
    shutil.rmtree(folder / "run" / "big")
    done = train(folder)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout
    for path, weights in zip((small, big), expected):
        again = load_logical(path)
        assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_every_stage_is_checked_before_the_first_starts(chain):
    result = train(chain, "stages.big.training.global_batch_size=7", "stages.middle.parallel.tensor=3",
                   "stages.big.parallel.pipeline=1")  # fmt: skip
    assert result.returncode == 2 and "Traceback" not in result.stdout
    assert "stage test-middle: parallel: tensor 3" in result.stdout
    assert "stage test-big: training.global_batch_size: 7" in result.stdout
    assert not (chain / "run").exists()


def test_the_data_of_every_stage_are_looked_at_before_the_first_starts(chain):
    write_tokens(chain / "short", documents=1)
    overrides = ["stages.middle.parallel.tensor=1", "stages.big.parallel.pipeline=1", "model.seq_length=128",
                 f"stages.big.data.train=[{{path: {chain}/short}}]"]  # fmt: skip
    result = train(chain, *overrides)
    assert result.returncode == 2 and result.stdout.count("error:") == 1, result.stdout
    assert f"{chain}/short.bin: has 100 tokens, one sample needs 129" in result.stdout
    assert not (chain / "run").exists()


def test_a_stage_that_cannot_grow_is_named_before_the_first_starts(chain):
    overrides = ["stages.middle.parallel.tensor=1", "stages.big.parallel.pipeline=1",
                 "stages.big.model.parameter_tokens.ffn=50"]  # fmt: skip
    result = train(chain, *overrides)
    assert result.returncode == 2 and "Traceback" not in result.stdout
    assert "stage test-big: model.parameter_tokens.ffn: 61 before, 50 after" in result.stdout
    assert not (chain / "run").exists()


def test_a_stage_that_changes_after_another_has_grown_from_it_is_refused(chain):
    flat = ["stages.middle.parallel.tensor=1", "stages.big.parallel.pipeline=1"]
    assert train(chain, *flat).returncode == 0
    result = train(chain, *flat, "stages.small.training.train_steps=8")
    assert result.returncode == 2
    assert "stage test-small: has steps to do, but" in result.stdout and "run/middle was grown from it" in result.stdout
