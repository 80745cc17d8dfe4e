from __future__ import annotations

from megatron_tf.telemetry.text import plural


def test_one_is_singular_and_every_other_number_is_not():
    assert [plural("step", count) for count in (0, 1, 2)] == ["steps", "step", "steps"]
