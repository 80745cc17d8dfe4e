from __future__ import annotations

import pytest

from megatron_tf.native import can_run_triton, kernels_wanted, processor


def test_kernels_run_unless_they_are_disabled(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("MEGATRON_TF_NATIVE", raising=False)
    assert kernels_wanted() and can_run_triton("cuda") and not can_run_triton("cpu")
    monkeypatch.setenv("MEGATRON_TF_NATIVE", "0")
    assert not kernels_wanted() and not can_run_triton("cuda")


def test_facts_of_the_processor(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    monkeypatch.setattr("megatron_tf.native.CPUINFO", file)
    assert processor.__wrapped__() == {}
    file.write_text("processor\t: 0\nmodel name\t: A: B\n\nprocessor\t: 1\nmodel name\t: C\n")
    assert processor.__wrapped__() == {"processor": "0", "model name": "A: B"}
