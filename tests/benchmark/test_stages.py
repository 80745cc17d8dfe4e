from __future__ import annotations

import pytest
import torch

from megatron_tf.benchmark import stages


def test_rows():
    (row,) = stages.rows(torch.device("cpu"), [torch.bfloat16], 24, 16, 8, 1)
    parts = [row[f"{name} ns"] for name in ("norm", "weights", "backward", "couple")]
    assert min(parts) > 0 and row["all stages ns"] == pytest.approx(sum(parts))
    assert row["stages / products"] == pytest.approx(row["all stages ns"] / row["products ns"])
