from __future__ import annotations

import math
import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from megatron_tf.model import Pattention, pattention
from megatron_tf.model.pattention import Form, partial_pattention
from megatron_tf.parallel.groups import SINGLE

ACTIVATIONS = ["l2_norm_gelu", "gelu_l2_norm", "softmax"]


def plain_formula(x, k, v, scale, activation):
    """The definition, written out; autograd derives the backward."""
    a = x @ k.mT
    if activation == "l2_norm_gelu":
        return F.gelu(a * scale / a.norm(dim=-1, keepdim=True)) @ v
    if activation == "gelu_l2_norm":
        g = F.gelu(a)
        return (scale * g / g.norm(dim=-1, keepdim=True)) @ v
    return scale * torch.softmax(a, -1) @ v


def inputs(n=12, d_in=5, d_out=7, rows=(3, 2), seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (*rows, d_in), (n, d_in), (n, d_out)
    return [torch.randn(s, dtype=torch.float64, generator=g).requires_grad_() for s in shapes]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_agrees_with_the_plain_formula_at_any_scale(activation):
    x, k, v = inputs()
    grad = torch.randn(3, 2, 7, dtype=torch.float64)
    ours = pattention(x, k, v, scale=2.5, activation=activation)
    plain = plain_formula(x, k, v, 2.5, activation)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (x, k, v), grad), torch.autograd.grad(plain, (x, k, v), grad)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x, k, v = inputs(n=6, d_in=3, d_out=4, rows=(2,))
    assert torch.autograd.gradcheck(lambda *t: pattention(*t, scale=1.7, activation=activation), (x, k, v))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_zero_scores_stay_finite(activation):
    x, k, v = inputs()
    with torch.no_grad():
        x[0, 0] = 0
    out = pattention(x, k, v, activation=activation)
    out.sum().backward()
    assert all(t.isfinite().all() for t in (out, x.grad, k.grad, v.grad))
    if activation != "softmax":
        assert (out[0, 0] == 0).all() and (x.grad[0, 0] == 0).all()


def test_softmax_does_not_overflow():
    x, k, v = (t.detach().float() for t in inputs())
    out = pattention(x * 1e4, k, v, activation="softmax")
    assert out.isfinite().all()
    torch.testing.assert_close(out, plain_formula(x * 1e4, k, v, 12.0, "softmax"))


def test_projections_that_share_x_equal_separate_calls():
    x, k, v = inputs()
    _, k2, v2 = inputs(n=9, seed=1)
    joint = partial_pattention(x, [k, k2], [v, v2], [3.0, 2.0], "l2_norm_gelu", SINGLE)
    grads = torch.autograd.grad(sum(o.square().sum() for o in joint), (x, k, v, k2, v2))
    single = [pattention(x, k, v, scale=3.0), pattention(x, k2, v2, scale=2.0)]
    expected = torch.autograd.grad(sum(o.square().sum() for o in single), (x, k, v, k2, v2))
    torch.testing.assert_close(joint, tuple(single), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected, rtol=1e-11, atol=1e-12)


def test_saved_for_backward_is_one_score_tensor_and_one_number_a_row():
    x, k, v = (t.detach().bfloat16().requires_grad_() for t in inputs(n=64, d_in=16, d_out=16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pattention(x, k, v)
    own = [t for t in saved if not any(t.data_ptr() == p.data_ptr() for p in (x, k, v))]
    assert sorted(t.nbytes for t in own) == [6 * 4, 6 * 64 * 2]


def test_scale_is_stored_not_recomputed():
    layer = Pattention(16, 4, 4, scale=3.0)
    assert layer.scale == 3.0 and Pattention(16, 4, 4).scale == math.sqrt(16)
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), pattention(x, layer.key_tokens, layer.value_tokens, scale=3.0))


@pytest.mark.parametrize("norm", ["direct", "gram"])
@pytest.mark.parametrize("projections", [1, 3])
def test_compiled_passes_make_scores_and_their_gradient_once(projections, norm):
    """No part of them is made elsewhere and copied. With 141 tokens rows are padded to 144 columns."""
    x = torch.randn(32, 40, requires_grad=True)
    tokens = [torch.randn(141, 40, requires_grad=True) for _ in range(2 * projections)]

    def outputs(x, *tokens):
        keys, values = tokens[:projections], tokens[projections:]
        return partial_pattention(x, keys, values, [12.0] * projections, "l2_norm_gelu", SINGLE, Form(norm))

    def both_passes():
        made = torch.compile(outputs, fullgraph=True)(x, *tokens)
        torch.autograd.backward(made, [torch.ones_like(out) for out in made])

    torch.compiler.reset()
    _, codes = run_and_get_code(both_passes)
    assert len(codes) == 2
    for code in codes:
        allocated = re.findall(r"empty_strided_cpu\(\(32, (\d+)\)", code)
        assert sum(int(columns) for columns in allocated if int(columns) % 144 == 0) == 144 * projections, allocated
