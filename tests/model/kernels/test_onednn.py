from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_tf import native
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


def test_products_depend_on_rows_by_a_few_numbers_of_them(by_onednn, monkeypatch):
    """Rows are those of the matrix in memory, which the left factor may be the transpose of."""
    monkeypatch.setattr(onednn, "MULTIPLE_OF_ROWS", 32)
    for rows, taken in ((1, False), (32, True), (40, False), (64, True)):
        x = torch.randn(rows, 7)
        assert onednn.faster(x, torch.randn(7, 5)) == taken
        assert onednn.faster(x.view(-1, 1, 7), torch.randn(7, 5)) == taken
        if rows > 1:
            assert onednn.faster(x.mT, torch.randn(rows, 5)) == taken
    assert not onednn.faster(torch.randn(32), torch.randn(32, 5))


def test_the_operator_gets_whole_matrices(by_onednn, monkeypatch):
    """Of a part of one it is a thousand times slower."""
    weights = []
    operators = SimpleNamespace(_linear_pointwise=lambda x, weight, *_: weights.append(weight) or x @ weight.mT)
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    left, parts = torch.randn(9, 8), torch.randn(16, 24)
    with torch.no_grad():
        for right in (parts[:8, :12], parts[:12, :8].mT, parts[::2], torch.randn(1, 6).expand(8, 6), parts[:8]):
            torch.testing.assert_close(onednn.multiply(left, right), left @ right)
    assert all(weight.is_contiguous() or weight.mT.is_contiguous() for weight in weights) and len(weights) == 5


def test_no_gradient_is_lost_in_silence():
    with pytest.raises(AssertionError, match="has no gradient"):
        onednn.multiply(torch.randn(4, 8), torch.randn(8, 6))


@pytest.mark.parametrize("vendor, expected", [("AuthenticAMD", True), ("GenuineIntel", False), (None, False)])
@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_processors(monkeypatch, vendor, expected, capability):
    monkeypatch.setattr(native, "processor", lambda: {"vendor_id": vendor} if vendor else {})
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn.mkl_is_slow.__wrapped__() == (expected and capability == "AVX512")
