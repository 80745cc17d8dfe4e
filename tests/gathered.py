"""Products of gathered rows as GPUs make them, for tests that count operators and memory on a CPU."""

from __future__ import annotations

import pytest
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from megatron_tf.model.kernels import gathered_products


def read_rows_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the results are allocated, and the products are one kernel that no operator of PyTorch stands for."""
    monkeypatch.setattr(gathered_products, "can_run_triton", lambda device_type: True)
    monkeypatch.setattr(gathered_products, "_launch", _launch)


def _launch(name: str, *arguments: Tensor) -> None:
    with _disable_current_modes():
        if name == "scores":
            x, rows, tokens, ends, out = arguments
            out.copy_(F.grouped_mm(x.index_select(0, rows), tokens.mT, offs=ends))
        else:
            scores, rows, x, ends, out = arguments
            out.copy_(F.grouped_mm(scores.mT, x.index_select(0, rows), offs=ends))
