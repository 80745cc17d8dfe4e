from __future__ import annotations

import copy
from typing import Any

import pytest

from megatron_tf.config.load import load_config
from megatron_tf.config.yaml_core import dump_yaml

SMALL = {
    "run": {"dir": "runs/small"},
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 32,
        "vocab_size": 256,
        "parameter_tokens": {"qkv": 48, "proj": 49, "ffn": 190},
    },
    "training": {"train_steps": 100, "global_batch_size": 16, "micro_batch_size": 2, "precision": "fp32"},
    "optimizer": {"lr": 6e-4},
    "data": {"train": [{"path": "data/train"}], "validation": [{"path": "data/validation"}]},
}


@pytest.fixture
def values() -> dict[str, Any]:
    """A small valid configuration as plain values, to be spoilt by a test."""
    return copy.deepcopy(SMALL)


@pytest.fixture
def small_path(tmp_path):
    path = tmp_path / "small.yml"
    path.write_text(dump_yaml(SMALL))
    return path


@pytest.fixture
def small(small_path):
    """small("parallel.tensor=2", ...) is the small configuration with these overrides."""
    return lambda *overrides: load_config(small_path, overrides)
