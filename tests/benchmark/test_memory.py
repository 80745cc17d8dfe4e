from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tf.benchmark import memory
from megatron_tf.config import load_config
from megatron_tf.model.kernels import fused_passes

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yml"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recomputed", ["false", "true"])
def test_a_step_is_within_a_tenth_of_the_estimate(monkeypatch, precision, recomputed):
    monkeypatch.setattr(fused_passes, "usable", lambda scores: False)  # the estimate is without native kernels
    # 8 samples: the few rows that the loss has in fp32, which the estimate leaves out, are some per cent then
    overrides = (
        "training.micro_batch_size=8",
        f"training.precision={precision}",
        f"training.activation_checkpointing={recomputed}",
    )
    rows = list(memory.rows(torch.device("cpu"), load_config(CONFIG, overrides)))
    assert [row["kind"] for row in rows] == ["state", "activations", "peak"]
    for row in rows:
        assert row["measured / estimated"] == pytest.approx(1, rel=0.1), row
