"""What is said about a run before it starts. The numbers of `describe` are compared in test_estimate.py."""

from __future__ import annotations

from pathlib import Path

from megatron_tf.config import load_config
from megatron_tf.plan import evaluation_warning, room_warning

TINY = Path(__file__).parents[1] / "configs" / "tiny.yml"


def test_an_evaluation_within_the_validation_data_is_silent():
    assert evaluation_warning(64, 64) is None


def test_an_evaluation_that_goes_round_its_data():
    assert evaluation_warning(10_000, 40) == (
        "evaluation.samples: 10,000, but the validation data has 40 samples: each evaluation goes round it 250.0 times "
        "and takes as much longer. Set it to at most 40."
    )
    assert "has 1 sample:" in evaluation_warning(2, 1)


def test_checkpoints_that_do_not_fit_on_the_disk():
    every, two = (load_config(TINY, ["checkpoint.interval_steps=10", f"checkpoint.keep_last={n}"]) for n in ("null", 2))
    mebibyte = 2**20
    assert room_warning(every, 100, mebibyte, 10 * mebibyte) is None
    assert room_warning(every, 101, mebibyte, 10 * mebibyte) == (
        "checkpoint: 11 checkpoints of 1 MiB need 11 MiB, and 10 MiB are free in runs/tiny. Make room, or set "
        "checkpoint.keep_last."
    )
    assert room_warning(two, 10**6, mebibyte, 3 * mebibyte) is None
    assert "3 checkpoints of 1 MiB need 3 MiB, and 2 MiB" in room_warning(two, 10**6, mebibyte, 2 * mebibyte)
    assert room_warning(two, 5, mebibyte, mebibyte) is None and room_warning(two, 0, mebibyte, 0) is None
