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


def test_a_gpu_without_products_in_fp8(config, monkeypatch):
    fp8 = config(training={"precision": "fp8"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert list(precision_problems(fp8)) == []  # a CPU emulates them
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (8, 0))
    assert list(precision_problems(fp8)) == [
        "training.precision: fp8 needs a GPU of compute capability 8.9 or more, such as an H100, and this NVIDIA "
        "A100-SXM4-80GB has 8.0. Set it to bf16."
    ]
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda own=capability: own)
        assert list(precision_problems(fp8)) == []
