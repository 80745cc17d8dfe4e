from __future__ import annotations

import pytest
import torch

from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.model import products
from megatron_tf.model.kernels import onednn
from megatron_tf.model.kernels.score_layout import empty_scores
from megatron_tf.model.linear import linear
from megatron_tf.model.pattention import pattention


def matrices(*shape):
    """A matrix of this shape in memory row by row, column by column, and as a part of a larger one."""
    return torch.randn(shape), torch.randn(shape[::-1]).mT, torch.randn(shape[0], shape[1] + 7)[:, : shape[1]]


@torch.no_grad()
def test_products_of_matrices_however_they_lie(by_onednn):
    for left in matrices(37, 21):
        for right in matrices(21, 45):
            exact = (left.double() @ right.double()).float()
            torch.testing.assert_close(products.multiply(left, right), exact)
            torch.testing.assert_close(products.add_product(left, right, torch.ones(37, 45)), exact + 1)
            out = empty_scores(left, 37, 45)
            products.write_product(left, right, out)
            torch.testing.assert_close(out, exact)
            torch.testing.assert_close(products.PLAIN.scores(left, right), exact)
    assert len(by_onednn) == 9 * 4


@torch.no_grad()
def test_a_product_that_is_copied_is_made_of_some_rows_at_a_time(by_onednn, monkeypatch):
    monkeypatch.setattr(products, "COPIED_ROWS", 8)
    left, right, out = torch.randn(20, 6), torch.randn(6, 5), torch.empty(20, 16)
    products.write_product(left, right, out[:, :5])
    torch.testing.assert_close(out[:, :5], left @ right)
    assert [len(rows) for rows, _ in by_onednn] == [8, 8, 4]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS.names()))
def test_pattention_is_that_of_fp64(by_onednn, activation):
    for tokens in (45, 48):
        leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 9, 24), (tokens, 24), (tokens, 20))]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        outs = [pattention(*own, scale=3.0, activation=activation) for own in (leaves, exact)]
        made = len(by_onednn)
        grad = torch.randn_like(outs[0])
        found = torch.autograd.grad(outs[0], leaves, grad)
        assert made >= 2 and len(by_onednn) >= made + 4
        for one, other in zip((outs[0], *found), (outs[1], *torch.autograd.grad(outs[1], exact, grad.double()))):
            assert (one - other).abs().max() < 3e-6 * other.abs().max()
        by_onednn.clear()


def test_where_pytorchs_products_are_taken(by_onednn, monkeypatch):
    left, right = torch.randn(4, 8), torch.randn(8, 6)
    assert onednn.faster(left, right)
    assert not onednn.faster(left.double(), right.double()) and not onednn.faster(left.bfloat16(), right.bfloat16())
    assert not onednn.faster(left.to("meta"), right.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn.faster(left, right)
        assert linear(left, right.mT).dtype == torch.bfloat16
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
