"""The problems themselves are in tests/training/test_preflight.py."""

from __future__ import annotations

from megatron_tf.engine.device import accelerator_problems, engine_problems, precision_problems


def test_a_device_that_is_here_is_no_problem(config, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert list(accelerator_problems({})) == list(accelerator_problems({"DS_ACCELERATOR": "cpu"})) == []
    assert list(precision_problems(config(training={"precision": "bf16"}))) == []


def test_an_engine_that_is_not_installed(config, monkeypatch):
    assert list(engine_problems(config())) == []
    monkeypatch.setattr("megatron_tf.engine.device.find_spec", lambda name: None)
    (problem,) = engine_problems(config())
    assert problem.startswith("parallel.engine: deepspeed is not installed here. Set it to torch, or `pip install")
    assert list(engine_problems(config(parallel={"engine": "torch"}))) == []
