"""Products of gathered rows as GPUs make them, for tests that count operators and memory on a CPU."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_tf.model.kernels import gathered_products


def read_rows_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the results are allocated, and the products are one kernel that no operator of PyTorch stands for."""
    monkeypatch.setattr(gathered_products, "can_run_triton", lambda device_type: True)
    monkeypatch.setattr(gathered_products, "_launch", _launch)


def _launch(name: str, *arguments: Tensor) -> None:
    *inputs, out = arguments
    portable = {"scores": gathered_products.scores_of_copies, "gradients": gathered_products.gradients_of_copies}
    with _disable_current_modes():
        out.copy_(portable[name](*inputs))
