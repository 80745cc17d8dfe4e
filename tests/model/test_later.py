"""Gradients of weights that are made later: the same, with the same work."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from megatron_tf.model.later import Later
from megatron_tf.model.linear import linear
from megatron_tf.model.projection import Entered, Pattention, leave_weights, partial_outputs


def _projections():
    """Of numbers of tokens that leave no gaps between scores."""
    torch.manual_seed(1)
    return nn.ModuleList(Pattention(number, 8, 8) for number in (16, 16, 32))


def _flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_the_gradients_of_tokens_are_those_of_one_pass():
    projections, x = _projections(), torch.randn(5, 2, 8, requires_grad=True)

    def backward():
        torch.stack(partial_outputs(list(projections), Entered(x))).square().sum().backward()

    whole = _flops(backward)
    expected = [x.grad, *(p.grad for p in projections.parameters())]
    x.grad = None
    projections.zero_grad()

    later = Later()
    leave_weights(projections, later)
    to_inputs = _flops(backward)
    assert all(p.grad is None for p in projections.parameters())
    finish = later.take()
    of_weights = _flops(finish)
    assert to_inputs + of_weights == whole
    # two products of 10 rows, 8 channels and 64 tokens
    assert of_weights == 2 * (2 * 10 * 8 * 64)
    for found, other in zip([x.grad, *(p.grad for p in projections.parameters())], expected):
        torch.testing.assert_close(found, other)


def test_what_was_taken_is_of_its_pass_alone():
    """A pass that follows, before the first one's gradients are made, adds its own to them."""
    weight, later = nn.Parameter(torch.randn(3, 4)), Later()
    first, second = torch.randn(2, 5, 4, requires_grad=True).unbind()
    finishes = []
    for x in (first, second):
        linear(x, weight, later).sum().backward()
        finishes.append(later.take())
    finishes[1]()
    torch.testing.assert_close(weight.grad, second.sum(0).expand(3, 4))
    finishes[0]()
    torch.testing.assert_close(weight.grad, (first + second).sum(0).expand(3, 4))
    later.take()()


@pytest.mark.parametrize("transposed", [False, True])
def test_products_have_the_gradients_of_matmul(transposed):
    weight = nn.Parameter(torch.randn(4, 3) if transposed else torch.randn(3, 4))
    x, later = torch.randn(2, 5, 4, requires_grad=True), Later()
    (x @ (weight if transposed else weight.mT)).square().sum().backward()
    expected = x.grad, weight.grad
    x.grad = weight.grad = None
    linear(x, weight, later, transposed).square().sum().backward()
    later.take()()
    torch.testing.assert_close((x.grad, weight.grad), expected)


def test_frozen_weights_get_none():
    weight, later = nn.Parameter(torch.randn(3, 4), requires_grad=False), Later()
    linear(torch.randn(5, 4, requires_grad=True), weight, later).sum().backward()
    later.take()()
    assert weight.grad is None
