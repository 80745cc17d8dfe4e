"""The native kernels against the same passes in PyTorch, in fp64; and what happens without a compiler."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_tf.activations.function import score_function
from megatron_tf.config.sections.model import Model
from megatron_tf.model import build_model, pattention
from megatron_tf.model.kernels import fused_passes, native_passes

ROWS, TOKENS, SCALE = 37, 203, 5.0
# errors are of rounding once to the type; fp32 sums of 203 terms add a few roundings more
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


@pytest.fixture
def portable(monkeypatch):
    monkeypatch.setattr(fused_passes, "usable", lambda scores: False)


def scores_and_gradient(dtype):
    """Columns of a wider matrix, as those of one of several projections are; a row of zeros; a large entry."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, ROWS, 2 * TOKENS, generator=generator)
    wide[0, 3] = 0
    wide[0, 4, TOKENS + 7] = 40.0
    scores, gradient = wide.to(dtype)[..., TOKENS:].unbind()
    return scores, gradient


def passes(scores, gradient):
    """Everything that the passes compute, one after the other."""
    function = score_function("l2_norm_gelu")
    whole_gradient, third_gradient = gradient.clone(), gradient.clone()
    r = function.statistic(scores)
    forward = function.weights(scores, r, SCALE)
    weights, total = function.backward(scores, r, gradient, SCALE)
    d = gradient.clone()
    function.couple(scores, r, total, gradient, SCALE)
    whole_r, whole_forward = function.statistic_and_weights(scores, SCALE)
    whole_weights = function.backward_and_couple(scores, r, whole_gradient, SCALE)
    third_weights, third_total, product = function.backward_with_product(scores, r, third_gradient, SCALE)
    for split, whole in (
        (r, whole_r), (forward, whole_forward), (weights, whole_weights), (gradient, whole_gradient),
        (weights, third_weights), (total, third_total), (d, third_gradient),
    ):  # fmt: skip
        assert torch.equal(split.nan_to_num(7), whole.nan_to_num(7))  # sharding must not change what is computed
    return {"r": r, "forward": forward, "weights": weights, "total": total, "d": d, "d_scores": gradient,
            "product": product}  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_native_agrees_with_fp64(dtype):
    scores, gradient = scores_and_gradient(dtype)
    assert fused_passes.usable(scores), "these tests want a C compiler"
    native = passes(scores, gradient.clone())
    exact = passes(scores.double(), gradient.double())
    for name, actual in native.items():
        scale = exact[name].abs().max().item()
        if name == "d_scores":  # D is rounded before A · T/r² is taken from it, and then the difference is
            scale += exact["d"].abs().max().item()
        torch.testing.assert_close(actual.double(), exact[name], rtol=0, atol=TOLERANCE[dtype] * scale, msg=name)


def test_gelu_of_any_argument_is_as_exact_as_fp32_can_say():
    u = torch.cat((torch.linspace(-12, 12, 100_001), torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30])))[None]
    one = torch.ones(1, 1)
    gradient = torch.ones_like(u)
    weights, _ = fused_passes.backward(u, one, gradient, 1.0)
    exact = u.double().requires_grad_()
    gelu = torch.nn.functional.gelu(exact)
    (slope,) = torch.autograd.grad(gelu.sum(), exact)
    torch.testing.assert_close(weights.double(), gelu.detach(), rtol=2e-7, atol=4e-7)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-7, atol=4e-7)
    torch.testing.assert_close(fused_passes.weights(u, one, 1.0), weights, rtol=2e-7, atol=4e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_native_kernels_keep_what_is_not_finite(dtype, value):
    scores, gradient = (tensor.clone() for tensor in scores_and_gradient(dtype))
    scores[5, 2] = value
    native = passes(scores, gradient)
    for name in ("forward", "weights", "d_scores"):
        assert not native[name][5].isfinite().all() and native[name][6].isfinite().all(), name
    scores, gradient = (tensor.clone() for tensor in scores_and_gradient(dtype))
    gradient[5, 2] = value
    assert not passes(scores, gradient)["d_scores"][5].isfinite().any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("way", ["native", "portable"])
def test_rows_at_the_ends_of_the_range(request, dtype, way):
    """Rows whose squares are lost are as rows of zeros, never NaN; one whose squares overflow is NaN, to be seen."""
    if way == "portable":
        request.getfixturevalue("portable")
    scores, gradient = (tensor.clone() for tensor in scores_and_gradient(dtype))
    for row, power in ((5, -80), (6, -72), (7, -66), (8, 66)):
        scores[row] *= 2.0**power
    found = passes(scores, gradient)
    for name in ("forward", "weights", "d_scores", "d"):
        assert found[name][5:8].isfinite().all() and not found[name][5:8].any(), name
        assert found[name][8].isnan().all() and found[name][9].isfinite().all(), name


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_gradients_of_tiny_scores_are_never_nan(activation):
    x, keys, values = torch.randn(3, 16, 24, generator=torch.Generator().manual_seed(0)).unbind()
    for power in (-80, -72, -66, -60, -50):
        own = (x * 2.0**power).requires_grad_()
        pattention(own, keys, values, activation=activation).sum().backward()
        assert own.grad.isfinite().all() and own.grad.any() == (power == -50), power


def test_results_do_not_depend_on_threads():
    scores, gradient = scores_and_gradient(torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(passes(scores, gradient.clone()))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_float16_and_other_types_take_the_portable_way():
    for dtype in (torch.float16, torch.float64):
        assert not fused_passes.usable(torch.zeros(1, 1, dtype=dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_portable_stages_agree_with_fp64(portable, dtype, activation):
    generator = torch.Generator().manual_seed(0)
    shapes = (9, 16), (40, 16), (40, 8)
    # scores below 5: softmax turns their rounding errors, which grow with them, into relative ones
    x, keys, values = (torch.randn(shape, generator=generator).mul_(0.6).to(dtype) for shape in shapes)

    def gradients(kind):
        inputs = [t.to(kind).requires_grad_() for t in (x, keys, values)]
        out = pattention(*inputs, activation=activation)
        return out, *torch.autograd.grad(out.square().sum(), inputs)

    # every intermediate step is rounded to the type
    for actual, exact in zip(gradients(dtype), gradients(torch.float64)):
        error = (actual.double() - exact).norm() / exact.norm()
        assert error < 5 * TOLERANCE[dtype]


def test_without_a_compiler_one_message_and_the_portable_way(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = native_passes._library.__wrapped__
    monkeypatch.setenv("CC", str(tmp_path / "no_compiler"))
    assert build() is None
    monkeypatch.setenv("CC", "false")
    assert build() is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "native" in caplog.text and "no_compiler" in caplog.text
    monkeypatch.delenv("CC")
    assert build() is not None


def test_kernels_are_not_used_where_they_are_not_wanted(monkeypatch):
    scores = torch.ones(1, 1)
    assert fused_passes.usable(scores)
    monkeypatch.setenv("MEGATRON_TF_NATIVE", "0")
    assert not fused_passes.usable(scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("native", "backend"),
    # what torch's own compiler makes of the native kernels is trained in tests/verification/test_layout.py as well
    [(True, "aot_eager"), (False, "inductor"), pytest.param(True, "inductor", marks=pytest.mark.scale)],
)
def test_a_block_compiles_without_a_graph_break(monkeypatch, native, backend):
    if not native:
        monkeypatch.setattr(fused_passes, "usable", lambda scores: False)
    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 8, "vocab_size": 8}
    config = Model.model_validate({**sizes, "parameter_tokens": {"qkv": 24, "proj": 16, "ffn": 40}})
    block = build_model(config).blocks[0]
    hidden = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    inputs = [hidden, *block.parameters()]
    torch._dynamo.reset()
    outs = [function(hidden) for function in (block, torch.compile(block, fullgraph=True, backend=backend))]
    results = [(out, *torch.autograd.grad(out.square().sum(), inputs)) for out in outs]
    for eager, compiled in zip(*results):  # the fused kernels sum in another order
        assert (compiled - eager).norm() / eager.norm() < 1e-5
