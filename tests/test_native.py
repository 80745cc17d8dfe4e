from __future__ import annotations

import pytest

from megatron_tf.native import kernels_wanted, triton_kernels_run


def test_kernels_run_unless_they_are_disabled(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("MEGATRON_TF_NATIVE", raising=False)
    assert kernels_wanted() and triton_kernels_run("cuda") and not triton_kernels_run("cpu")
    monkeypatch.setenv("MEGATRON_TF_NATIVE", "0")
    assert not kernels_wanted() and not triton_kernels_run("cuda")
