"""The problems themselves are in tests/training/test_preflight.py."""

from __future__ import annotations

from megatron_tf.engine.device import accelerator_problems, precision_problems


def test_a_device_that_is_here_is_no_problem(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert list(accelerator_problems({})) == list(accelerator_problems({"DS_ACCELERATOR": "cpu"})) == []
    assert list(precision_problems(config(training={"precision": "bf16"}))) == []
