"""Runs whose Pattentions multiply in fp8."""

from __future__ import annotations

from launching import train


def test_a_run_in_fp8_goes_on_at_another_layout_and_in_bf16(folder):
    """Checkpoints hold nothing of it."""
    shared = ("optimizer.schedule.warmup_steps=0", "checkpoint.interval_steps=1")
    single = train(folder, "training.precision=fp8", "training.train_steps=2", *shared)
    assert single.returncode == 0, single.stdout
    assert "fp8     experimental: products of Pattention, all else in bf16; this device has none" in single.stdout
    assert "norms of qkv, proj, ffn from KᵀK" in single.stdout
    sharded = train(folder, "training.precision=fp8", "training.train_steps=3", *shared,
                    "parallel={engine: torch, tensor: 2, sequence: true}", ranks=2)  # fmt: skip
    assert sharded.returncode == 0, sharded.stdout
    in_bf16 = train(folder, "training.precision=bf16", "training.train_steps=4", *shared)
    assert in_bf16.returncode == 0, in_bf16.stdout
    assert "training.precision" in in_bf16.stdout, "a resume says what changed"
    assert [int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step_*")].count(4) == 1
