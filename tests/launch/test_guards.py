"""Steps that go wrong, and runs that lose a rank."""

from __future__ import annotations

import json

import pytest
import torch
from launching import train

from megatron_tf.checkpoint import load_logical


@pytest.mark.parametrize(
    ("engine", "stage", "precision"),
    [("deepspeed", 0, "fp32"), ("deepspeed", 1, "fp32"), ("deepspeed", 1, "fp16"), ("torch", 1, "fp16")],
)
def test_steps_that_are_not_finite_change_nothing_and_stop_the_run(folder, engine, stage, precision):
    """In fp16 as soon as the loss scale, 2 and then 1, cannot fall any more."""
    overrides = [f"zero.stage={stage}", f"training.precision={precision}", "deepspeed.fp16.initial_scale_power=1",
                 "optimizer.lr=1e25", "optimizer.schedule.warmup_steps=0",
                 "optimizer.schedule.type=constant", "training.train_steps=9", "training.gradient_clipping=0",
                 "guard.nonfinite_patience=3", "checkpoint.interval_steps=1"]  # fmt: skip
    result = train(folder, *overrides)
    if "fp16 needs a GPU" in result.stdout:
        pytest.skip("this processor has no fp16")
    assert result.returncode == 2 and "Traceback" not in result.stdout
    assert "3 in a row, as many as guard.nonfinite_patience allows: the run stops" in result.stdout
    assert "gradient not finite" in result.stdout
    assert ("skipped, loss scale 1 " in result.stdout) == (precision == "fp16")
    if stage:
        assert "first in embedding" in result.stdout
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.isfinite(tensor).all() for tensor in load_logical(folder / "run").values())
    assert [record["optim/skipped_steps"] for record in records if "train/loss" in record][-1] >= 1
    assert [record for record in records if "train/diverged" in record] == records[-1:]


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_the_run_with_its_message(folder):
    """An id beyond the vocabulary is found by the one rank that reads it; the others must not end in a traceback."""
    bad = folder / "tokens.bin"
    content = bytearray(bad.read_bytes())
    content[2 * 1000] = 255  # u16 ids below 99
    bad.write_bytes(content)
    result = train(folder, "training.micro_batch_size=4", ranks=2, launcher="deepspeed")
    assert result.returncode != 0
    assert "vocabulary" in result.stdout and "255" in result.stdout
    assert "Traceback" not in result.stdout
