"""Products in 8 bits: rounding, accuracy, backward pass, layouts."""

from __future__ import annotations

import math

import pytest
import torch
from distributed import spawn
from projections import both_passes, tensors
from torch.nn import functional as F

from megatron_tf.config.sections.training import Training
from megatron_tf.model import fp8, gram, rounded_scores, rounding
from megatron_tf.model.later import Later
from megatron_tf.model.pattention import Form, partial_pattention
from megatron_tf.model.projection import Pattention, choose_forms, without_fp8
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.state.parameters import shard_range

FP8 = Form("gram", fp8=True)
# Root mean square of the rounding of a number whose logarithm is uniform, as a part of it: half a unit of the last
# digit over √3, times √(3/(8 ln 2)), what 1/mantissa is on average.
VALUE, GRADIENT = (2.0**-digits / math.sqrt(3) * math.sqrt(3 / (8 * math.log(2))) for digits in (4, 3))
KINDS = [(rounding.VALUES, 448.0), (rounding.GRADIENTS, 57344.0)]


def quantised(x, kind):
    """(2ᵏ x in the float8 type `kind`, 2⁻ᵏ)."""
    made = rounding.rounded(x.reshape(1, -1), gradient=kind == rounding.GRADIENTS)
    assert made.by_row.dtype == kind
    return made.by_row[0, : x.numel()].reshape(x.shape), made.down


@pytest.mark.parametrize(("kind", "most"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounds_as_torch_does(kind, most, dtype):
    """By the largest power of two with which nothing overflows, whatever the size."""
    for size in (1e-30, 3e-4, 1.0, 447.0, 448.0, 449.0, 6e4, 1e30):
        x = (torch.linspace(-1, 1, 257) * size).to(dtype)
        values, down = quantised(x, kind)
        power = math.floor(math.log2(most / x.abs().max().item()))
        assert down.item() == 2.0**-power and down.dtype == torch.float32
        assert torch.equal(values.float(), (x * 2.0**power).to(kind).float())


@pytest.mark.parametrize(("kind", "most"), KINDS)
def test_what_the_type_has_is_not_changed(kind, most):
    """All its numbers, and each times a power of two."""
    every = torch.arange(256, dtype=torch.uint8).view(kind).float()
    every = every[every.isfinite()]
    for factor in (2.0**-20, 1.0, 2.0**20):
        values, down = quantised(every * factor, kind)
        assert torch.equal(values.float() * down, every * factor)


def test_digits_of_an_element_do_not_depend_on_the_largest():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    alone, together = (values.float() * down for values, down in (
        quantised(x, rounding.VALUES), quantised(torch.cat([x, torch.tensor([100.0])]), rounding.VALUES)
    ))  # fmt: skip
    kept = x.abs() > 100 * 2.0**-13
    assert kept.sum() > 900 and torch.equal(alone[kept], together[:-1][kept])


@pytest.mark.parametrize("n", [576, 34480, 200_000])
def test_a_known_bound_costs_no_digits(n):
    """Rows of n scores with norm τ: typical ones are as if their scale were found from them. What is rounded more
    coarsely is so small that the error of the whole is that of rounding to 4 bits."""
    scale = n**0.5
    s = F.gelu(torch.randn(8, n, generator=torch.Generator().manual_seed(0)))
    known, found = rounding.rounded(s, bound=scale).values(), rounding.rounded(s).values()
    kept = s.abs() > 2.0**-6 * 2 * scale / 224
    assert kept.float().mean() > 0.7 and torch.equal(known[kept], found[kept])
    assert ((known - s).norm() / s.norm()).item() == pytest.approx(VALUE, rel=0.1)


@pytest.mark.parametrize("gradient", [False, True])
def test_beyond_a_known_bound_is_the_largest_number(gradient):
    x = torch.tensor([[1.0, -3.0, 1e30, -1e30]])
    values = rounding.rounded(x, gradient=gradient, bound=1.0).values()
    assert torch.equal(values, x.clamp(-3.5, 3.5)), "there is room for twice the bound"


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(bad):
    left, right = torch.ones(16, 16), torch.ones(16, 16)
    left[0, 0] = bad
    for product in (fp8.emulated_product, fp8.scaled_product):
        assert not product(left, right).isfinite().any(), "whole, as a step with it is skipped"
    assert (fp8.emulated_product(torch.zeros(2, 3), right[:3]) == 0).all()


@pytest.mark.parametrize("gradient", [None, "left", "right"])
@pytest.mark.parametrize("sizes", [(32, 48, 16), (7, 37, 21)])
def test_product_of_gpus_is_the_emulated_one(sizes, gradient):
    """Here on the CPU, for which torch has it as well. Sizes that need padding, and factors that are turned."""
    generator, (m, k, n) = torch.Generator().manual_seed(0), sizes
    left, right = torch.randn(k, m, generator=generator).mT, torch.randn(n, k, generator=generator).mT
    scaled, emulated = (product(left, right, gradient) for product in (fp8.scaled_product, fp8.emulated_product))
    torch.testing.assert_close(scaled, emulated, rtol=1e-6, atol=1e-5)
    low = fp8.scaled_product(left.bfloat16(), right.bfloat16(), gradient)
    assert low.dtype == torch.bfloat16 and low.shape == (m, n)
    bound = (1 + 2 * (2.0**-3 if gradient else 2.0**-4)) * 1.1 - 1
    assert ((emulated - left @ right).abs() <= bound * (left.abs() @ right.abs())).all()


@pytest.fixture
def never_direct(monkeypatch):
    monkeypatch.setattr(gram, "loses_digits", lambda *given: False)


SIZES = {"tokens": (256, 192), "width": 64, "rows": (512,)}
SCALES = (16.0, 192**0.5)


@pytest.fixture
def kernels(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(rounding, "usable", lambda x: True)


def test_error_with_kernels_is_that_of_rounding(never_direct, kernels):
    """In Triton's interpreter. S and D are rounded once, from fp32."""
    test_error_is_that_of_rounding(torch.bfloat16, never_direct)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_error_is_that_of_rounding(dtype, never_direct):
    """Errors of factors are independent, so their squares add up; a GELU of u with a deviation of 1 and its derivative
    hand on about as much as they get."""
    exact = both_passes(*tensors(**SIZES), Form("gram"), scales=SCALES)
    ours = both_passes(*tensors(**SIZES, dtype=dtype), FP8, scales=SCALES)
    scores = VALUE**2 + VALUE**2
    of_scores = GRADIENT**2 + VALUE**2 + scores  # dA
    expected = {
        "outputs": scores + 2 * VALUE**2,
        "x and keys": of_scores + GRADIENT**2 + VALUE**2,
        "values": scores + VALUE**2 + GRADIENT**2,
    }
    names = ["outputs"] * 2 + ["x and keys"] * 3 + ["values"] * 2
    for name, own, right in zip(names, (*ours[0], *ours[1]), (*exact[0], *exact[1])):
        error = ((own.double() - right).norm() / right.norm()).item()
        assert error == pytest.approx(math.sqrt(expected[name]), rel=0.15), name


@pytest.mark.parametrize("keep_scores", [True, False])
def test_backward_is_its_formula(keep_scores, never_direct):
    x, keys, values, grads = tensors(tokens=(40,), rows=(9,))
    x, d_out, (k,), (v,), scale = x, grads[0], keys, values, 2.5

    def value(t):
        return rounding.rounded(t).values()

    def gradient(t):
        return rounding.rounded(t, gradient=True).values()

    def weights(t):
        return rounding.rounded(t, bound=scale).values()

    # r as the layer has it, which is in fp32 at least, and its own gradient
    whole_x, whole_k = x.clone().requires_grad_(), k.clone().requires_grad_()
    r = gram.norms(whole_x, gram.matrices([whole_k], SINGLE))
    c = 2.0 ** (scale / r.detach()).log2().round()
    scaled = c * x
    u = (scale / (c * r.detach())) * (value(scaled) @ value(k).mT)
    u = u.requires_grad_()
    s = F.gelu(u)
    out = weights(s) @ value(v)
    d_s = gradient(d_out) @ value(v).mT
    d_u = torch.autograd.grad(s, u, d_s)[0]
    d_a = d_u * scale / (c * r.detach())
    d_v = weights(s).mT @ gradient(d_out)
    of_norm = torch.autograd.grad(r, (whole_x, whole_k), -(d_u * u).sum(-1, keepdim=True) / r.detach())
    d_x = c * (gradient(d_a) @ value(k)) + of_norm[0]
    d_k = gradient(d_a).mT @ value(scaled) + of_norm[1]
    (own, own_d_x), (own_d_k, own_d_v) = both_passes(
        x, keys, values, grads, Form("gram", keep_scores, fp8=True), scales=(scale,)
    )
    for ours, expected in ((own, out), (own_d_x, d_x), (own_d_k, d_k), (own_d_v, d_v)):
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-10, atol=1e-10)


def test_gradients_of_tokens_that_are_left_for_later(never_direct):
    x, keys, values, grads = tensors()
    _, expected = both_passes(x, keys, values, grads, FP8)
    leaves, later = [tensor.clone().requires_grad_() for tensor in (*keys, *values)], Later()
    leaf = x.clone().requires_grad_()
    outs = partial_pattention(
        leaf, leaves[:2], leaves[2:], (2.5, 3.0), "l2_norm_gelu", SINGLE, FP8._replace(later=later)
    )
    torch.autograd.backward(outs, grads)
    later.take()()
    for own, whole in zip(leaves, expected):
        torch.testing.assert_close(own.grad, whole)


def test_rows_of_very_different_sizes_have_the_same_digits(never_direct):
    """A row's length is no part of what a Pattention computes, so neither is it of its rounding."""
    x, keys, values, grads = tensors(**SIZES)
    factors = 2.0 ** torch.arange(512).remainder(40)[:, None].sub(20).double()
    (whole, *_), _ = both_passes(x, keys, values, grads, FP8, scales=SCALES)
    (scaled, *_), _ = both_passes(x * factors, keys, values, grads, FP8, scales=SCALES)
    torch.testing.assert_close(scaled, whole, rtol=1e-12, atol=1e-12)


def test_where_the_norm_loses_digits_nothing_is_rounded(monkeypatch):
    monkeypatch.setattr(gram, "loses_digits", lambda *given: True)
    given = tensors(dtype=torch.float32)
    ours, direct = (both_passes(*given, form) for form in (FP8, Form()))
    assert all(torch.equal(a, b) for a, b in zip((*ours[0], *ours[1]), (*direct[0], *direct[1])))


def test_a_pass_rounds_each_matrix_once(never_direct, monkeypatch):
    """Looked through once at most, S never."""
    x, (keys, _), (values, _), (grad, _) = tensors(rows=(9,))
    looked, made = [], []
    look, make = rounding.portable_largest, rounding.portable_rounded
    monkeypatch.setattr(rounding, "portable_largest", lambda x: (looked.append(x.shape), look(x))[1])
    monkeypatch.setattr(rounding, "portable_rounded", lambda x, *rest: (made.append(x.shape), make(x, *rest))[1])
    leaf = x.requires_grad_()
    (out,) = partial_pattention(leaf, [keys], [values], (2.5,), "l2_norm_gelu", SINGLE, FP8)
    rows, (n, d) = x[..., 0].numel(), keys.shape
    assert sorted(made) == sorted([(rows, d), (n, d), (rows, n), (n, d)])
    assert (rows, n) not in looked and len(looked) == 3
    del looked[:], made[:]
    out.backward(grad)
    of_scores = [shape for shape in made if n in shape and rows in shape]
    assert len(made) == 6 and len(of_scores) == 2, "S and dA, and x, K, V and dO"
    assert len(looked) == 5 and len([shape for shape in looked if n in shape and rows in shape]) == 1, "dA"


@pytest.mark.parametrize("keep_scores", [True, False])
def test_a_layer_by_the_kernels_is_that_by_pytorch(never_direct, monkeypatch, keep_scores):
    """In Triton's interpreter, bit for bit, where S and dA are made in their type before they are rounded."""
    pytest.importorskip("triton")
    monkeypatch.setattr(rounded_scores, "usable", lambda function, scores: False)
    form = Form("gram", keep_scores, fp8=True)
    given = tensors(tokens=(40, 29), width=16, rows=(21,), dtype=torch.float32)
    expected = both_passes(*given, form)
    monkeypatch.setattr(rounding, "usable", lambda x: True)
    found = both_passes(*given, form)
    assert all(torch.equal(a, b) for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1])))


@pytest.mark.parametrize("keep_scores", [True, False])
def test_a_layer_whose_scores_are_rounded_by_kernels(never_direct, kernels, monkeypatch, keep_scores):
    """Against passes of PyTorch, in Triton's interpreter: only what lies on the edge between two numbers of 8 bits may
    go the other way. Numbers of tokens and of rows are no multiples of 16."""
    form = Form("gram", keep_scores, fp8=True)
    given = tensors(tokens=(40, 29), width=16, rows=(21,), dtype=torch.float32)
    found = both_passes(*given, form)
    monkeypatch.setattr(rounding, "usable", lambda x: False)
    expected = both_passes(*given, form)
    for own, other in zip((*found[0], *found[1]), (*expected[0], *expected[1])):
        assert own.dtype == other.dtype and own.shape == other.shape
        assert (own - other).norm() <= 2.0**-8 * other.norm()


def test_gradients_left_for_later_are_the_same_with_kernels(never_direct, kernels):
    x, keys, values, grads = tensors(dtype=torch.float32)
    _, expected = both_passes(x, keys, values, grads, FP8)
    leaves, later = [tensor.clone().requires_grad_() for tensor in (*keys, *values)], Later()
    form = FP8._replace(later=later)
    outs = partial_pattention(
        x.clone().requires_grad_(), leaves[:2], leaves[2:], (2.5, 3.0), "l2_norm_gelu", SINGLE, form
    )
    torch.autograd.backward(outs, grads)
    later.take()()
    for own, whole in zip(leaves, expected):
        torch.testing.assert_close(own.grad, whole)


def test_kernels_compiled_without_a_graph_break(kernels):
    test_compiled_without_a_graph_break()


def test_compiled_without_a_graph_break():
    x, keys, values, _ = tensors(dtype=torch.float32)

    def layer(x):
        return partial_pattention(x, keys, values, (2.5, 3.0), "l2_norm_gelu", SINGLE, FP8)

    leaf = x.requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for own, expected in zip(compiled(leaf), layer(leaf)):
        torch.testing.assert_close(own, expected)
        pair = (torch.autograd.grad(out.square().sum(), leaf, retain_graph=True) for out in (own, expected))
        torch.testing.assert_close(*pair)


def test_the_products_of_gpus_compiled_without_a_graph_break(monkeypatch):
    """Their operator around torch's product of 8-bit numbers, which CPUs do not have in every version of torch."""

    def scaled_mm(left, right, left_down, left_recipe, right_down, right_recipe, output_dtype):
        return (left.to(output_dtype) @ right.to(output_dtype)) * left_down * right_down

    monkeypatch.setattr(fp8, "_multiplied", fp8.scaled_product)
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    test_compiled_without_a_graph_break()


def over_ranks(group):
    """Nothing is exchanged for the rounding. What the ranks' order of sums changes is turned into a unit of the last of
    4 bits (3 of a gradient) only where a number lies on the edge between two: seldom, in fp64."""
    x, keys, values, grads = tensors(tokens=(41, 29), rows=(7,))
    expected, token_grads = both_passes(x, keys, values, grads, Form("gram", fp8=True))
    own = [slice(*shard_range(len(k), group.size, group.rank)) for k in keys]
    own_tokens = [[token[rows] for token, rows in zip(tokens, own)] for tokens in (keys, values)]
    partial, own_grads = both_passes(x, *own_tokens, grads, FP8, group)
    torch.testing.assert_close(all_reduce(torch.stack(partial), group), torch.stack(expected), rtol=1e-10, atol=1e-10)
    for grad, whole, rows in zip(own_grads, token_grads, (*own, *own)):
        torch.testing.assert_close(grad, whole[rows], rtol=1e-10, atol=1e-10)


def test_ranks_round_as_one_process_does():
    spawn(over_ranks, 2)


def test_a_configuration_chooses_it_and_can_be_overruled():
    layer = Pattention(64, 8, 8)
    for precision, form in (("bf16", Form()), ("fp8", FP8)):
        choose_forms(layer, Training(global_batch_size=1, micro_batch_size=1, precision=precision), "cpu")
        assert layer.form == form
    with without_fp8(layer):
        assert layer.form == Form("gram")
    assert layer.form == FP8
