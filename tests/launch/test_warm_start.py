"""A new run on the weights of another one, and what a run that is started again says of itself."""

from __future__ import annotations

import json

import pytest
from launching import train

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.config.load import load_config


def succeed(result):
    assert result.returncode == 0 and "Traceback" not in result.stdout, result.stdout
    return result.stdout


def evaluations(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["eval/loss"] for record in records if "eval/loss" in record}


def test_weights_of_another_run_and_then_a_resume(folder):
    """On two tensor ranks, with a schedule and an optimizer of its own; then on one, with other values."""
    succeed(train(folder))
    warm = (f"run.dir={folder}/warm", f"training.init_from={folder}/run")
    out = succeed(train(folder, *warm, "parallel.tensor=2", "optimizer.lr=3e-3", ranks=2))
    source = folder / "run" / "checkpoints" / "step_00000006"
    assert f"begins with the weights of {source} (step 6, 768 tokens); optimizer, schedule and data" in out
    assert f"seed 1234, begun with the weights of {source}" in out
    assert evaluations(folder / "warm")[0] == pytest.approx(evaluations(folder / "run")[6], rel=1e-6)
    index = open_checkpoint(folder / "warm" / "checkpoints" / "step_00000003").index
    assert (index.step, index.samples, index.tokens, index.growth_history) == (3, 24, 384, ())
    assert {steps for ranges in index.adam_steps.values() for *_, steps in ranges} == {3}

    out = succeed(train(folder, *warm, "training.train_steps=8", "optimizer.lr=2e-3"))
    assert f"resumed from {folder}/warm/checkpoints/step_00000006 at step 6" in out
    assert f"begun with the weights of {source}" in out
    assert "configuration: 4 of its values changed since step 6" in out
    for line in ("optimizer.lr: 0.003 before, 0.002 now", "parallel.tensor: 2 before, 1 now",
                 "training.train_steps: 6 before, 8 now", "ranks: 2 before, 1 now"):  # fmt: skip
        assert f"  {line}" in out
    assert load_config(folder / "warm" / "config.1.yml").optimizer.lr == 3e-3
    assert load_config(folder / "warm" / "config.yml").optimizer.lr == 2e-3
    index = open_checkpoint(folder / "warm" / "checkpoints" / "step_00000008").index
    began, resumed = index.run["history"]
    assert (began["source"], began["step"], began["tokens"]) == (str(source), 6, 768)
    assert resumed["step"] == 6 and resumed["changes"]["optimizer.lr"] == ["0.003", "0.002"]
