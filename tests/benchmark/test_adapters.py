from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megatron_tf.benchmark import adapters

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def table():
    return {row["adapter"]: row for row in adapters.rows(CPU, 4, 256, 2, 32, rank=8, rounds=1)}


def test_all_adapters_have_as_many_parameters_as_lora(table):
    wanted = table["LoRA"]["parameters"]
    assert wanted == 4 * 8 * (4 * 2 * 256 + 3 * (256 + 680))
    trained = {name: row["parameters"] for name, row in table.items() if name != "none"}
    assert table["none"]["parameters"] == 0 and len(trained) == 5
    assert all(abs(count - wanted) / wanted < 0.08 for count in trained.values()), trained


def test_what_is_kept_for_the_backward_pass(table):
    """Counted, so it is the same on every machine. Two wide branches keep less than seven pairs of thin products."""
    shares = {name: row["of LoRA's"] for name, row in table.items()}
    assert shares["none"] == 0 and shares["LoRA"] == 1
    assert shares["Pattention, attention and MLPs"] <= 0.6
    assert shares["Pattention, MLPs"] < shares["Pattention, attention and MLPs"]
    assert shares["soft mixture, MLPs"] > 1
    assert all(row["step ms"] > 0 and row["training × LoRA"] > 0 for row in table.values())


def test_the_soft_mixture_is_that_of_its_formula():
    torch.manual_seed(0)
    mixture = adapters.SoftMixture(16, 3).double()
    torch.nn.init.normal_(mixture.output)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for place in range(5):
        for sample in range(2):
            own, parts = x[sample, place], []
            for head in range(4):
                columns = slice(4 * head, 4 * head + 4)
                weights = F.softmax(mixture.keys[:, columns] @ own[columns] / 2, 0)
                parts.append(weights @ mixture.values[:, 12 * head : 12 * head + 12])
            expected[sample, place] = own @ torch.cat(parts).view(16, 3) @ mixture.output
    torch.testing.assert_close(mixture(x), expected)
