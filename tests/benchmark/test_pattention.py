from __future__ import annotations

import pytest
import torch

from megatron_tf.benchmark import pattention as mode
from megatron_tf.benchmark.counting import saved_bytes
from megatron_tf.benchmark.references import bare_products, gelu_mlp, plain_formula
from megatron_tf.model import pattention

CPU = torch.device("cpu")


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 4, 16), (48, 16), (48, 8)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def test_plain_formula_is_the_same_function():
    tensors = inputs()
    outs = [layer(*tensors) for layer in (pattention, plain_formula)]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-12, atol=1e-12)
    ours, plain = (torch.autograd.grad(out.square().sum(), tensors) for out in outs)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-11)


def test_bare_products_are_those_of_forward_and_backward():
    """Those of two products with nothing between them."""
    x, keys, values = inputs()
    out = x @ keys.mT @ values
    grad = torch.randn_like(out)
    d_x, d_keys, d_values = torch.autograd.grad(out, (x, keys, values), grad)
    bare = bare_products(x, keys, values, grad)
    for actual, expected in zip(bare, (out, d_values, d_x, d_keys)):
        torch.testing.assert_close(actual.view_as(expected), expected)


def test_saved_for_backward():
    x, keys, values = inputs(torch.bfloat16)
    rows, n = x[..., 0].numel(), keys.shape[0]
    scores = 2 * rows * n

    def saved(layer):
        return saved_bytes(lambda: layer(x, keys, values), [x, keys, values])

    assert saved(pattention) == scores + 4 * rows
    assert saved(gelu_mlp) == 2 * scores
    assert saved(plain_formula) > 3 * scores


def test_rows():
    row, other = mode.rows(CPU, [torch.float32, torch.bfloat16], [32], 16, 8, 1)
    assert (row["dtype"], row["tokens"], other["dtype"]) == ("float32", 32, "bfloat16")
    assert row["saved/row pattention"] == 4 * 32 + 4 and other["saved/row pattention"] == 2 * 32 + 4
    assert all(row[name] > 0 for name in ("× gram", "× plain", "× mlp", "of floor"))
    assert row["saved/row gram"] == 4 * 32 + 4 + 4 * 8 * 8 // 16  # and KᵀK


@pytest.mark.timing
@pytest.mark.parametrize("tokens", [2304, 8560])
def test_faster_than_the_plain_formula_and_no_slower_than_an_mlp(tokens):
    """What is left above the floor depends on the processor; the order does not."""
    (row,) = mode.rows(CPU, [torch.float32], [tokens], 2048, 768, 9)
    assert row["× plain"] > 1.15 and row["× mlp"] > 0.95, row
