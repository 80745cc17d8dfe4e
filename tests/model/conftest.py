from __future__ import annotations

import pytest

from megatron_tf.model.kernels import onednn


@pytest.fixture
def by_onednn(monkeypatch):
    """As on a processor on which oneDNN is the faster one, for products of any size. Counts its products."""
    calls = []
    multiply = onednn.multiply
    monkeypatch.setattr(onednn, "LEAST_MULTIPLICATIONS", 1)
    monkeypatch.setattr(onednn, "MULTIPLE_OF_ROWS", 1)
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(onednn, "multiply", lambda *factors: calls.append(factors) or multiply(*factors))
    return calls
