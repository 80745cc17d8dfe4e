"""Chains that split tokens into candidates at another layout, or put a bank next to them, and go on growing."""

from __future__ import annotations

import json
import re

import pytest
import torch
from launching import train

from megatron_tf.checkpoint.reader import open_checkpoint

STAGES = """
stages:
  - name: small
    training: {train_steps: 3}
  - name: split
    model: {sparse: {ffn: {group_size: 16, candidates: 3, dense: 5}}}
    growth: {method: split}
    parallel: {tensor: 2, sequence: true}
    training: {train_steps: 4, activation_checkpointing: true}
    logging: {health_interval_steps: 2}
  - name: again
    model: {sparse: {ffn: {group_size: 16, candidates: 6, dense: 5}}}
    growth: {method: split}
    parallel: {tensor: 1, sequence: false, pipeline: 2}
    training: {train_steps: 4}
  - name: big
    model: {parameter_tokens: {qkv: 19, ffn: 69}, sparse: {ffn: {group_size: 16, candidates: 6, dense: 5}}}
    growth: {method: zero_key}
    parallel: {tensor: 1, sequence: false, pipeline: 2}
"""


@pytest.mark.slow
def test_a_chain_with_a_split_proves_itself_at_every_layout(folder):
    config = folder / "config.yml"
    config.write_text(config.read_text() + STAGES)
    done = train(folder, ranks=2)
    assert done.returncode == 0, done.stdout[:6000]
    index = open_checkpoint(folder / "run" / "big" / "checkpoints" / "step_00000006").index
    assert [entry["method"] for entry in index.growth_history] == ["split", "split", "zero_key"]
    for entry in index.growth_history:
        assert entry["preserves"] and entry["loss_before"] == pytest.approx(entry["loss_after"], rel=1e-6)
    assert index.tensors["blocks.1.ffn.bank.key_tokens"].shape == (4 * 6 * 16, 32)
    metrics = [json.loads(line) for line in (folder / "run" / "split" / "metrics.jsonl").read_text().splitlines()]
    logged = {key for record in metrics for key in record}
    assert {"train/balance", "train/load_max"} <= logged, logged
    log = (folder / "run" / "split" / "train.log").read_text()
    assert re.search(
        r"step 4  health of ffn: .*fullest candidate \d\.\d\d × an equal share, \d+% of the candidates un", log
    )
    assert "step 4  health of qkv: " in log
    assert "growth: new routers follow clusters of 768 positions of training data" in log
    # the second split parts existing candidates, whose routers go on
    assert "new routers" not in (folder / "run" / "again" / "train.log").read_text()


# The second layer moves to the first of two stages.
DEEPER = ("model.num_layers=4", "growth.depth_method=stack")


@pytest.mark.slow
def test_routers_of_a_split_are_the_same_at_every_layout(started):
    """Fitted to clusters; candidates that hardly learn keep them."""
    found = {}
    for name, ranks, *options in (
        ("one", 1), ("random", 1, "growth.routers=random"), ("data", 2), ("stages", 2, "parallel.pipeline=2"),
        ("tensor", 2, "parallel.tensor=2", "parallel.sequence=true"), ("torch", 2, "parallel.engine=torch"),
        ("deeper", 1, *DEEPER), ("deeper_stages", 2, "parallel.pipeline=2", *DEEPER),
    ):  # fmt: skip
        done = train(
            started, f"run.dir={started / name}", f"growth.from={started / 'run'}", "growth.method=split",
            "model.sparse={ffn: {group_size: 16, candidates: 3, dense: 5}}", "training.train_steps=1",
            "optimizer={lr: 1e-9, schedule: {warmup_steps: 0}}", *options, ranks=ranks,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[:6000]
        reader = open_checkpoint(started / name / "checkpoints" / "step_00000001")
        found[name] = {
            tensor: reader.read(tensor, "weight", 0, reader.index.tensors[tensor].numel)
            for tensor in reader.index.tensors
            if tensor.endswith((".router", ".balance"))
        }
    assert len(found["one"]) == 4 and len(found["deeper"]) == 8
    for name in ("data", "stages", "tensor", "torch", "deeper_stages"):
        expected = found["deeper" if name == "deeper_stages" else "one"]
        for tensor, values in expected.items():
            assert values.abs().max() > 1e-5
            torch.testing.assert_close(found[name][tensor], values, rtol=0, atol=1e-6)
    for layer in (1, 3):  # a layer and its copy
        for tensor in ("router", "balance"):
            copied, fitted = f"blocks.{layer}.ffn.bank.{tensor}", f"blocks.1.ffn.bank.{tensor}"
            torch.testing.assert_close(found["deeper"][copied], found["one"][fitted], rtol=0, atol=1e-6)
    assert not torch.allclose(found["random"]["blocks.0.ffn.bank.router"], found["one"]["blocks.0.ffn.bank.router"])


BANK = """
stages:
  - name: small
    training: {train_steps: 3}
  - name: bank
    model: {parameter_tokens: {ffn: 69}, sparse: {ffn: {group_size: 16, candidates: 3, dense: 37}}}
    growth: {method: bank}
    parallel: {tensor: 2, sequence: true}
"""


@pytest.mark.slow
def test_a_bank_next_to_the_tokens_proves_itself_and_learns(folder):
    config = folder / "config.yml"
    config.write_text(config.read_text() + BANK)
    done = train(folder, ranks=2)
    assert done.returncode == 0, done.stdout[:6000]
    reader = open_checkpoint(folder / "run" / "bank" / "checkpoints" / "step_00000006")
    (entry,) = reader.index.growth_history
    assert entry["method"] == "bank" and entry["preserves"]
    assert entry["loss_before"] == pytest.approx(entry["loss_after"], rel=1e-6)
    name = "blocks.1.ffn.bank.key_tokens"
    shape = reader.index.tensors[name].shape
    assert shape == (2 * 3 * 16, 32) and reader.read(name, "weight", 0, 96 * 32).any()
    assert reader.index.adam_steps[name] == ((0, 96 * 32, 6),)
    assert reader.index.adam_steps["blocks.1.ffn.key_tokens"] == ((0, 37 * 32, 9),)
