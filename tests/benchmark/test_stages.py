from __future__ import annotations

import pytest
import torch

from megatron_tf.benchmark import stages


def test_rows():
    (row,) = stages.rows(torch.device("cpu"), [torch.bfloat16], 24, 16, 8, 1)
    for way, names in (("split", stages.SPLIT), ("whole", stages.WHOLE)):
        parts = [row[f"{name} ns"] for name in names]
        assert min(parts) > 0 and row[f"{way} / products"] == pytest.approx(sum(parts) / row["products ns"])
