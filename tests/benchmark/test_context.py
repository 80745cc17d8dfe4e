from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from megatron_tf.benchmark import modes

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yml"
# long enough for what ranks share to be most of the memory, whatever buffers the processor's products take
SMALL = ["model.seq_length=8192", "model.vocab_size=64", "model.num_layers=2"]


@pytest.mark.slow
def test_ranks_that_share_a_sample_hold_less_of_it():
    arguments = argparse.Namespace(config=CONFIG, overrides=SMALL, ranks=[1, 2])
    one, two = modes.run_context(torch.device("cpu"), arguments)
    assert [one["context ranks"], two["context ranks"]] == [1, 2]
    assert two["planned activations MiB"] == pytest.approx(one["planned activations MiB"] / 2, rel=0.1)
    assert two["grows MiB"] < 0.8 * one["grows MiB"]
    assert two["remainder MiB"] == pytest.approx(two["grows MiB"] - one["grows MiB"] / 2)
    assert [two[name] for name in ("loss", "gradient norm")] == pytest.approx(
        [one[name] for name in ("loss", "gradient norm")], rel=1e-5
    )
