"""Runs in fp16 whose loss scale is never found."""

from __future__ import annotations

import pytest
from launching import train


@pytest.mark.parametrize("engine", ["deepspeed", "torch"])
def test_a_run_in_fp16_of_which_no_step_changes_the_weights_fails(folder, engine):
    result = train(folder, f"parallel.engine={engine}", "training.precision=fp16", "training.train_steps=3",
                   "optimizer.schedule.warmup_steps=0", "deepspeed.fp16.initial_scale_power=40")  # fmt: skip
    if "fp16 needs a GPU" in result.stdout:
        pytest.skip("this processor has no fp16")
    assert result.returncode == 2 and "Traceback" not in result.stdout
    assert "reached its last step 3, but the last 3 were skipped" in result.stdout
    assert "set deepspeed.fp16.initial_scale_power to at most 3" in result.stdout
    assert not list((folder / "run" / "checkpoints").glob("step_*"))
