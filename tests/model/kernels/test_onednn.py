from __future__ import annotations

import pytest
import torch

from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.model import products
from megatron_tf.model.kernels import onednn
from megatron_tf.model.kernels.score_layout import empty_scores
from megatron_tf.model.later import Later, product
from megatron_tf.model.pattention import pattention


@pytest.fixture
def everywhere(monkeypatch):
    """As on a processor on which oneDNN is the faster one, for products of any size. Counts its products."""
    calls = []
    multiply = onednn.multiply
    monkeypatch.setattr(onednn, "LEAST_MULTIPLICATIONS", 1)
    monkeypatch.setattr(onednn, "is_faster_here", lambda: True)
    monkeypatch.setattr(onednn, "multiply", lambda *factors: calls.append(factors) or multiply(*factors))
    return calls


def matrices(*shape):
    """A matrix of this shape in memory row by row, column by column, and as a part of a larger one."""
    return torch.randn(shape), torch.randn(shape[::-1]).mT, torch.randn(shape[0], shape[1] + 7)[:, : shape[1]]


@torch.no_grad()
def test_products_of_matrices_however_they_lie(everywhere):
    for left in matrices(37, 21):
        for right in matrices(21, 45):
            exact = (left.double() @ right.double()).float()
            torch.testing.assert_close(products.multiply(left, right), exact)
            torch.testing.assert_close(products.add_product(left, right, torch.ones(37, 45)), exact + 1)
            out = empty_scores(left, 37, 45)
            products.write_product(left, right, out)
            torch.testing.assert_close(out, exact)
            torch.testing.assert_close(products.PLAIN.scores(left, right), exact)
    assert len(everywhere) == 9 * 4


@torch.no_grad()
def test_a_product_that_is_copied_is_made_of_some_rows_at_a_time(everywhere, monkeypatch):
    monkeypatch.setattr(products, "COPIED_ROWS", 8)
    left, right, out = torch.randn(20, 6), torch.randn(6, 5), torch.empty(20, 16)
    products.write_product(left, right, out[:, :5])
    torch.testing.assert_close(out[:, :5], left @ right)
    assert [len(rows) for rows, _ in everywhere] == [8, 8, 4]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
def test_gradients_of_a_product_with_a_weight(everywhere, transposed, deferred):
    x, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn((8, 6) if transposed else (6, 8))
    weight.requires_grad_()
    later = Later() if deferred else None
    out = product(x, weight, later, transposed)
    expected = x @ (weight if transposed else weight.mT)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    wanted = torch.autograd.grad((expected * weights).sum(), [x, weight])
    (out * weights).sum().backward()
    if later is not None:
        assert weight.grad is None
        later.take()()
    for leaf, grad in zip((x, weight), wanted):
        torch.testing.assert_close(leaf.grad, grad)
    assert len(everywhere) == 3


def test_only_gradients_that_are_wanted_are_made(everywhere):
    x, weight = torch.randn(5, 8), torch.randn(6, 8, requires_grad=True)
    product(x, weight).sum().backward()
    assert weight.grad is not None and len(everywhere) == 2


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS.names()))
def test_pattention_is_that_of_fp64(everywhere, activation):
    for tokens in (45, 48):
        leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 9, 24), (tokens, 24), (tokens, 20))]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        outs = [pattention(*own, scale=3.0, activation=activation) for own in (leaves, exact)]
        made = len(everywhere)
        grad = torch.randn_like(outs[0])
        found = torch.autograd.grad(outs[0], leaves, grad)
        assert made >= 2 and len(everywhere) >= made + 4
        for one, other in zip((outs[0], *found), (outs[1], *torch.autograd.grad(outs[1], exact, grad.double()))):
            assert (one - other).abs().max() < 3e-6 * other.abs().max()
        everywhere.clear()


def test_where_pytorchs_products_are_taken(everywhere, monkeypatch):
    left, right = torch.randn(4, 8), torch.randn(8, 6)
    assert onednn.faster(left, right)
    assert not onednn.faster(left.double(), right.double()) and not onednn.faster(left.bfloat16(), right.bfloat16())
    assert not onednn.faster(left.to("meta"), right.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.faster(left, right)
        assert product(left, right.mT).dtype == torch.bfloat16
    monkeypatch.setattr(onednn, "LEAST_MULTIPLICATIONS", 4 * 8 * 6 + 1)
    assert not onednn.faster(left, right)
    monkeypatch.setattr(onednn, "LEAST_MULTIPLICATIONS", 1)
    monkeypatch.setenv("MEGATRON_TF_NATIVE", "0")
    assert not onednn.faster(left, right)


def test_no_gradient_is_lost_in_silence():
    with pytest.raises(AssertionError, match="has no gradient"):
        onednn.multiply(torch.randn(4, 8), torch.randn(8, 6))


@pytest.mark.parametrize("vendor, expected", [("AuthenticAMD", True), ("GenuineIntel", False), (None, False)])
@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_processors(monkeypatch, vendor, expected, capability):
    monkeypatch.setattr(onednn, "processor", lambda: {"vendor_id": vendor} if vendor else {})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn.is_faster_here.__wrapped__() == (expected and capability == "AVX512")
