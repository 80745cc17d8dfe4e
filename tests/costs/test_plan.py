"""What is said about a run before it starts. The numbers of `describe` are compared in test_estimate.py."""

from __future__ import annotations

from pathlib import Path

from megatron_tf.config import load_config
from megatron_tf.costs.plan import room_warning

TINY = Path(__file__).parents[2] / "configs" / "tiny.yml"


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
