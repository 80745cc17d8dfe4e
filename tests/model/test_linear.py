from __future__ import annotations

import pytest
import torch

from megatron_tf.model.later import Later
from megatron_tf.model.linear import linear


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
def test_gradients(by_onednn, transposed, deferred):
    x, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn((8, 6) if transposed else (6, 8))
    weight.requires_grad_()
    later = Later() if deferred else None
    out = linear(x, weight, later, transposed)
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
    assert len(by_onednn) == 3


def test_only_gradients_that_are_wanted_are_made(by_onednn):
    x, weight = torch.randn(5, 8), torch.randn(6, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(6, 8))
    assert len(by_onednn) == 2
