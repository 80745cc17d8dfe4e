from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from megatron_tf.benchmark import modes

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yml"
SMALL = ["model.seq_length=16", "training.micro_batch_size=2", "model.vocab_size=64", "model.num_layers=2"]


@pytest.mark.slow
def test_each_layout_has_a_row():
    arguments = argparse.Namespace(config=CONFIG, overrides=SMALL, rounds=1)
    rows = list(modes.run_engines(torch.device("cpu"), arguments))
    assert [row["layout"] for row in rows] == ["TP2", "PP2", "DP2"]
    for row in rows:
        assert row["torch / deepspeed"] == pytest.approx(row["torch s"] / row["deepspeed s"])
