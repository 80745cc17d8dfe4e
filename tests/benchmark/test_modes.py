"""Which forms of a model a mode shows when the configuration leaves the choice."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tf.benchmark.modes import forms_of
from megatron_tf.config import load_config

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yml"
SPARSE = "model.sparse={ffn: {group_size: 64, candidates: 4}}"


@pytest.mark.parametrize(
    ("overrides", "norms", "scores"),
    [
        ((), ["direct", "gram"], ["keep", "recompute"]),
        (("training.norm=gram", "training.scores=recompute"), ["gram"], ["recompute"]),
        (("model.activation=softmax",), ["direct"], ["keep", "recompute"]),
        ((SPARSE,), ["direct"], ["keep"]),
    ],
)
def test_forms_that_a_model_has(overrides, norms, scores):
    config = load_config(CONFIG, overrides)
    assert [found.training.norm for found in forms_of(config, "norm", "direct", "gram")] == norms
    assert [found.training.scores for found in forms_of(config, "scores", "keep", "recompute")] == scores
