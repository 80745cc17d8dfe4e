"""The Gram form against the direct one: outputs, gradients, what is saved and sent, and where it would lose digits."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from distributed import spawn
from projections import both_passes, tensors

from megatron_tf.activations import overlap
from megatron_tf.activations.built_in import GELU_L2_NORM, L2_NORM_GELU, SOFTMAX
from megatron_tf.activations.forms import norm_form
from megatron_tf.benchmark.counting import Counting
from megatron_tf.model import gram
from megatron_tf.model.pattention import DIRECT, Form, partial_pattention
from megatron_tf.parallel.collectives import all_reduce
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.state.parameters import shard_range

GRAM = Form("gram")
# of an average direction's r²: above it, no r in bf16 is its least value, that of its rounding error
LEAST_SHARE = 1 / 32


@pytest.fixture
def never_direct(monkeypatch):
    """The Gram form even where it loses digits."""
    monkeypatch.setattr(gram, "loses_digits", lambda *tensors: False)


@pytest.mark.parametrize("keep_scores", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"tokens": (4, 3), "width": 9}, {"tokens": (64,), "rows": (1,)}])
def test_equals_the_direct_form(sizes, keep_scores, never_direct):
    """Of many tokens, of fewer tokens than channels, and of one position."""
    given = tensors(**sizes)
    expected, ours = (both_passes(*given, form) for form in (DIRECT, Form("gram", keep_scores)))
    for direct, own in zip((*expected[0], *expected[1]), (*ours[0], *ours[1])):
        torch.testing.assert_close(own, direct, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", ["direct", "gram"])
def test_scores_of_some_rows_at_a_time(norm, never_direct, monkeypatch):
    monkeypatch.setattr(overlap, "ROWS_AT_ONCE", 2)
    given = tensors(rows=(5,))
    expected, ours = (both_passes(*given, form) for form in (DIRECT, Form(norm, keep_scores=False)))
    for direct, own in zip((*expected[0], *expected[1]), (*ours[0], *ours[1])):
        torch.testing.assert_close(own, direct, rtol=1e-12, atol=1e-12)


def test_chunks_of_rows_are_nearly_equal(monkeypatch):
    monkeypatch.setattr(overlap, "ROWS_AT_ONCE", 4)
    assert [overlap.row_chunks(rows) for rows in (0, 1, 4, 9)] == [(0,), (1,), (4,), (3, 3, 3)]


def test_equals_the_direct_form_in_fp32(never_direct):
    given = tensors(dtype=torch.float32)
    expected, ours = (both_passes(*given, form) for form in (DIRECT, GRAM))
    for direct, own in zip((*expected[0], *expected[1]), (*ours[0], *ours[1])):
        torch.testing.assert_close(own, direct)


def test_is_as_near_in_bf16(never_direct):
    """Its error against fp64 is at most twice the direct form's."""
    exact = both_passes(*tensors(tokens=(256,), width=32, rows=(64,)), DIRECT)
    given = tensors(tokens=(256,), width=32, rows=(64,), dtype=torch.bfloat16)

    def errors(form):
        own = both_passes(*given, form)
        pairs = zip((*own[0], *own[1]), (*exact[0], *exact[1]))
        return torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs])

    assert (errors(GRAM) < 2 * errors(DIRECT)).all()


def test_gradcheck(never_direct):
    x, keys, values, _ = tensors(tokens=(8,), width=3, rows=(2,))
    leaves = [tensor.requires_grad_() for tensor in (x, *keys, *values)]
    assert torch.autograd.gradcheck(
        lambda x, k, v: partial_pattention(x, [k], [v], [1.7], "l2_norm_gelu", SINGLE, GRAM), leaves
    )


def test_rows_and_keys_of_zeros_give_zeros():
    for zero in ("row", "keys"):
        x, keys, values, grads = tensors()
        (x[0, 0] if zero == "row" else keys[0]).zero_()
        whole, of_tokens = both_passes(x, keys, values, grads, GRAM)
        direct, of_tokens_directly = both_passes(x, keys, values, grads, DIRECT)
        assert (whole[0][0, 0] == 0).all()
        for own, expected in zip((*whole, *of_tokens), (*direct, *of_tokens_directly)):
            torch.testing.assert_close(own, expected, rtol=1e-11, atol=1e-12)


def test_compiled_without_a_graph_break():
    x, keys, values, _ = tensors()

    def layer(x, form):
        return partial_pattention(x, keys, values, (2.5, 3.0), "l2_norm_gelu", SINGLE, form)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    for form in (GRAM, Form("gram", keep_scores=False), DIRECT):
        outs = compiled(leaf, form)
        torch.testing.assert_close(outs, layer(x, form), rtol=1e-12, atol=1e-12)
        expected = torch.autograd.grad(sum(layer(leaf, DIRECT)).square().sum(), leaf)
        torch.testing.assert_close(torch.autograd.grad(sum(outs).square().sum(), leaf), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, GRAM), layer(x, GRAM))


def near_singular(dtype, weight=1e-6):
    """Keys whose last channel has little weight, and a row along it."""
    x, keys, values, grads = tensors(tokens=(40,), dtype=dtype)
    keys[0][:, -1] *= weight
    x[0, 0] = torch.tensor([0, 0, 0, 0, 0, 1], dtype=dtype)
    return x, keys, values, grads


@pytest.mark.parametrize(("dtype", "weight"), [(torch.float32, 1e-6), (torch.bfloat16, 1 / 8), (torch.float16, 1 / 16)])
def test_where_digits_would_be_lost_the_direct_form_is_taken(dtype, weight):
    given = near_singular(dtype, weight)
    expected, ours = both_passes(*given, DIRECT), both_passes(*given, GRAM)
    assert all(torch.equal(own, direct) for own, direct in zip((*ours[0], *ours[1]), (*expected[0], *expected[1])))


def test_digits_are_lost_in_a_wide_model_too():
    """There the least norm of its rounding error is more than 2⁻¹⁰ of an average one."""
    x, keys = torch.randn(1, 2048), torch.randn(64, 2048)
    matrices = gram.matrices([keys], SINGLE)
    assert not gram.loses_digits(x, matrices, gram.norms(x, matrices))
    along = torch.linalg.qr(keys.mT, mode="complete")[0][None, :, -1]
    assert gram.loses_digits(along, matrices, gram.norms(along, matrices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_squares_overflow_are_nan(dtype):
    x, keys, values, grads = tensors(tokens=(64,), dtype=dtype)
    x[0, 0] *= 1e21
    (outputs, d_x), _ = both_passes(x, keys, values, grads, GRAM)
    for found in (outputs, d_x):
        assert found[0, 0].isnan().all() and found[0, 1].isfinite().all()


def test_no_norm_is_smaller_than_the_rounding_of_its_terms(never_direct):
    """So a row near the null space of the keys gives what is finite and no larger than the direct form's."""
    x, keys, values, grads = near_singular(torch.float32)
    keys[0][:, -1] *= 1e-6
    matrices = gram.matrices(keys, SINGLE)
    norms = gram.norms(x.flatten(0, 1), matrices)
    scores = x.flatten(0, 1) @ keys[0].mT
    assert (norms >= scores.norm(dim=-1, keepdim=True) * (1 - 1e-5)).all()
    ours = both_passes(x, keys, values, grads, GRAM)
    assert all(own.isfinite().all() for own in (*ours[0], *ours[1]))


@pytest.mark.parametrize("condition", [10, 83, 1000])
@pytest.mark.parametrize("part", [1, 4, 16, 32])
def test_error_of_norms_in_bf16(condition, part):
    """Of rows in the weakest `part` of 32 directions: at most a rounding over their share of an average direction's r²;
    and no r is less than half of what it is, where nothing is left of it."""
    generator = torch.Generator().manual_seed(0)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(random(32, 32))[0]
    spectrum = torch.logspace(0, -math.log10(condition), 32, dtype=torch.float64)
    keys = (torch.linalg.qr(random(256, 32))[0] * spectrum @ directions.mT).bfloat16()
    x = (random(64, part) @ directions.mT[-part:]).bfloat16()
    exact = (x.double() @ keys.double().mT).norm(dim=-1)
    share = exact.square() / (x.double().square().sum(-1) * keys.double().square().sum() / 32)
    norms = gram.norms(x, gram.matrices([keys], SINGLE))[:, 0]
    error = (norms / exact - 1).abs()
    assert (error * share < torch.finfo(torch.bfloat16).eps)[share > LEAST_SHARE].all()
    assert (share > LEAST_SHARE).all() or (condition > 10 and part < 32)
    assert (norms > exact / 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_rows_lose_no_digits(dtype):
    x, keys, _, _ = tensors(tokens=(256,), width=32, rows=(64,), dtype=dtype)
    matrices = gram.matrices(keys, SINGLE)
    assert not gram.loses_digits(x, matrices, gram.norms(x, matrices))


@pytest.mark.parametrize(("norm", "matrices"), [("direct", 0), ("gram", 4 * 16 * 16)])
def test_saved_without_scores_are_x_and_at_most_two_numbers_a_row(norm, matrices):
    x, keys, values, _ = tensors(tokens=(64,), rows=(12,), width=16, dtype=torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in (x, *keys, *values)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        partial_pattention(
            leaves[0], leaves[1:2], leaves[2:], [8.0], "l2_norm_gelu", SINGLE, Form(norm, keep_scores=False)
        )
    known = {tensor.data_ptr() for tensor in leaves}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    assert sum(size for pointer, size in storages.items() if pointer not in known) <= matrices + 12 * 2 * 4


def over_ranks(group, keep_scores):
    x, keys, values, grads = tensors(tokens=(41, 29), rows=(7,))
    expected, token_grads = both_passes(x, keys, values, grads, DIRECT)
    own = [slice(*shard_range(len(k), group.size, group.rank)) for k in keys]
    own_tokens = [[token[rows] for token, rows in zip(tokens, own)] for tokens in (keys, values)]
    with Counting() as counted:
        partial, own_grads = both_passes(x, *own_tokens, grads, Form("gram", keep_scores), group)
    assert counted.sent == {("all_reduce", 8 * 2 * 6 * 6): 2}  # KᵀK and its gradient, and no row
    torch.testing.assert_close(all_reduce(torch.stack(partial), group), torch.stack(expected), rtol=1e-11, atol=1e-12)
    for grad, whole, rows in zip(own_grads, token_grads, (*own, *own)):
        torch.testing.assert_close(grad, whole[rows], rtol=1e-11, atol=1e-12)
    of_a_step(group, x, own_tokens, grads, [whole[rows] for whole, rows in zip(token_grads, (*own, *own))])


def of_a_step(group, x, own_tokens, grads, expected):
    """Three micro batches, two of them in flight at a time: KᵀK and its gradient are made once, and are whole."""
    step, leaves = gram.StepMatrices(), [token.clone().requires_grad_() for tokens in own_tokens for token in tokens]

    def forward():
        return partial_pattention(x, leaves[:2], leaves[2:], (2.5, 3.0), "l2_norm_gelu", group, GRAM, step=step)

    for doubled in (1, 2):
        step.begin(3)
        for leaf in leaves:
            leaf.grad = None
        with Counting() as counted:
            first, second = forward(), forward()
            torch.autograd.backward(first, grads)
            with torch.no_grad():
                forward()  # an evaluation has its own
            third = forward()
            torch.autograd.backward(third, grads)
            torch.autograd.backward(second, grads)
        assert counted.sent == {("all_reduce", 8 * 2 * 6 * 6): 3} and not step.in_use
        # a factor of the keys cancels in what they compute
        factors = 3 / doubled, 3 / doubled, 3, 3
        for leaf, grad, factor in zip(leaves, expected, factors):
            torch.testing.assert_close(leaf.grad, factor * grad, rtol=1e-11, atol=1e-12)
        for keys in leaves[:2]:
            keys.data.mul_(2)  # as an update may be, out of autograd's sight


def test_over_ranks_no_row_is_exchanged():
    """41 and 29 tokens do not divide by 2."""
    spawn(over_ranks, 2, False)


def test_which_projections_take_it():
    def chosen(wanted, tokens, ranks, device, activation=L2_NORM_GELU, **where):
        return norm_form(wanted, activation, tokens, 768, ranks, device, **where)

    assert chosen("auto", 34480, 2, "cuda") == "gram"
    assert chosen("auto", 34480, 1, "cuda") == chosen("auto", 34480, 2, "cpu") == "direct"
    least = 5 * 768
    assert chosen("auto", 2 * least - 1, 2, "cuda") == chosen("direct", 34480, 2, "cuda") == "direct"
    assert chosen("auto", least, 4, "cuda", own_rows=True) == chosen("auto", 4 * least, 4, "cuda") == "gram"
    assert chosen("auto", 3 * least - 1, 4, "cuda", own_rows=True, compiled=True) == "direct"
    assert chosen("gram", 10, 1, "cpu") == "gram"
    assert {chosen("gram", 34480, 2, "cuda", other) for other in (GELU_L2_NORM, SOFTMAX)} == {"direct"}
