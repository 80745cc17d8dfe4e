from __future__ import annotations

import pytest

from megatron_tf.native import can_run_triton, kernels_wanted


def test_kernels_run_unless_they_are_disabled(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("MEGATRON_TF_NATIVE", raising=False)
    assert kernels_wanted() and can_run_triton("cuda") and not can_run_triton("cpu")
    monkeypatch.setenv("MEGATRON_TF_NATIVE", "0")
    assert not kernels_wanted() and not can_run_triton("cuda")
