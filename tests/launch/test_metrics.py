"""What a run logs, and that looking at its health changes nothing of it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from launching import train

from megatron_tf.checkpoint.load import load_logical

EVERY_STEP = {
    "train/loss", "train/loss_step", "train/perplexity", "optim/lr", "optim/grad_norm", "optim/skipped_steps",
    "perf/tokens_per_second",
    "perf/tokens_per_second_per_device", "perf/step_seconds", "perf/eta_seconds", "perf/mfu",
}  # fmt: skip


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [["parallel.pipeline=2"], ["parallel.tensor=2", "parallel.sequence=true", "training.precision=bf16"]],
    ids=lambda overrides: overrides[0],
)
def test_training_is_the_same_with_and_without_health(folder, overrides):
    runs = {}
    for name, own in (("without", []), ("with", ["logging.health_interval_steps=2"])):
        done = train(folder, f"run.dir={folder}/{name}", *overrides, *own, ranks=2)
        assert done.returncode == 0, done.stdout
        runs[name] = (records(folder / name), load_logical(folder / name))
    (plain, weights), (watched, others) = runs["without"], runs["with"]
    for key in ("train/loss", "optim/grad_norm", "eval/loss"):
        values = [[record[key] for record in run if key in record] for run in (plain, watched)]
        assert values[0] == values[1], key  # to the last bit
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    health = [record for record in watched if "health/ffn/active_share" in record]
    assert [record["step"] for record in health] == [2, 4, 6]
    assert not any(key.startswith("health") for record in plain for key in record)
    for record in health:
        for kind in ("qkv", "proj", "ffn"):
            assert record[f"health/{kind}/score_norm"] > 0 and 0 < record[f"health/{kind}/active_share"] <= 1
            assert f"health/{kind}/new_share" not in record  # it never grew


@pytest.mark.slow
def test_metrics_of_a_grown_run(folder):
    done = train(folder)
    assert done.returncode == 0, done.stdout
    logged = [record for record in records(folder / "run") if "train/loss" in record]
    assert all(record.keys() >= EVERY_STEP for record in logged)
    for record in logged:
        assert record["train/loss"] == record["train/loss_step"]  # each step is logged
        assert record["train/perplexity"] == pytest.approx(math.exp(record["train/loss"]))
        assert record["perf/tokens_per_second_per_device"] == record["perf/tokens_per_second"]
        assert any(key.startswith("memory/") and value > 2**20 for key, value in record.items())
        assert "optim/lr_new_tokens" not in record
    assert [record["perf/eta_seconds"] > 0 for record in logged] == [True] * 5 + [False]
    grown = [f"run.dir={folder}/grown", f"growth.from={folder}/run", "model.parameter_tokens.ffn=50",
             "growth.lr_multipliers={old_tokens: 0.5, new_tokens: 3, new_tokens_decay_steps: 2, other: 0}"]  # fmt: skip
    done = train(folder, *grown, "training.train_steps=2", "logging.health_interval_steps=1")
    assert done.returncode == 0, done.stdout
    every = records(folder / "grown")
    for record in (record for record in every if "optim/lr" in record):
        assert record["optim/lr_old_tokens"] == 0.5 * record["optim/lr"] and record["optim/lr_other"] == 0
        assert record["optim/lr_new_tokens"] == {1: 3, 2: 2}[record["step"]] * record["optim/lr"]
    first, last = [record for record in every if "health/ffn/new_share" in record]
    # new keys are 0 and the first update has lr 0: the new tokens are dead, then they learn
    assert (first["health/ffn/new_dead_share"], first["health/ffn/new_share"]) == (1.0, 0.0)
    assert last["health/ffn/new_dead_share"] < 1 and last["health/ffn/new_share"] > 0
    assert "health/qkv/new_share" not in first  # these did not grow
