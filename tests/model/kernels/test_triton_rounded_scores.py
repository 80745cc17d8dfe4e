"""The GPU's kernels that make S and D in 8 bits, against the formulas in fp64; without a GPU, in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
from megatron_tf.activations.function import score_function
from megatron_tf.model import rounded_scores, rounding
from megatron_tf.model.products import PLAIN
from megatron_tf.model.rounding import ALIGNMENT, aligned

FUNCTION = score_function("l2_norm_gelu")
SCALE, WIDTH = 5.0, 24
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda" and torch.cuda.get_device_capability() < rounding.CAPABILITY:
    pytest.skip("this GPU has no 8-bit numbers", allow_module_level=True)
# Errors relative to an element, of rounding to the nearest number of 4 or 3 bits, and of arithmetic in fp32. Absolute
# ones where numbers have fewer digits: half of the smallest number.
VALUE, GRADIENT = (2.0**-4 + 1e-5, 2.0**-10), (2.0**-3 + 1e-5, 2.0**-17)


def drawn(rows, counts, dtype):
    """Scores of projections in one matrix with gaps of NaN, gradients of outputs, value tokens, norms of which one is
    0, and scales."""
    generator = torch.Generator().manual_seed(rows)
    columns = [aligned(count) for count in counts]
    scores = torch.full((rows, sum(columns)), math.nan, dtype=dtype)
    parts = [part[:, :count] for part, count in zip(scores.split(columns, -1), counts)]
    for part in parts:
        part.copy_(torch.randn(part.shape, generator=generator))
        part[rows // 2] = 0
    scores = scores[:, : scores.shape[1] - columns[-1] + counts[-1]].to(DEVICE)
    parts = [part[:, :count] for part, count in zip(scores.split([*columns[:-1], counts[-1]], -1), counts)]
    outputs = [torch.randn(rows, WIDTH, generator=generator).to(DEVICE, dtype) for _ in counts]
    values = [torch.randn(count, WIDTH, generator=generator).to(DEVICE, dtype) for count in counts]
    norms = [part.float().norm(dim=-1, keepdim=True) for part in parts]
    return scores, parts, outputs, values, norms, [SCALE + i for i in range(len(counts))]


def check(found, exact, errors, down):
    relative, absolute = errors
    bound = relative * exact.abs() + absolute * down.double()
    assert ((found.double() - exact).abs() <= bound).all()


CASES = [(21, (40,)), (64, (64,)), (70, (130, 29, 48)), (5, (1100,)), (1, (1,))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "counts"), CASES)
def test_weights(rows, counts, dtype):
    _, parts, _, _, norms, scales = drawn(rows, counts, dtype)
    for a, r, scale in zip(parts, norms, scales):
        made = rounded_scores.weights(a, r, scale)
        assert made.shape == a.shape and made.by_column is None and made.dtype == dtype
        assert not made.by_row[rows:].float().any() and not made.by_row[:, a.shape[1] :].float().any()
        check(made.values(), FUNCTION.weights(a.double(), r.double(), scale), VALUE, made.down)


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "counts"), CASES)
def test_backward(rows, counts, dtype, by_row):
    """With plain products, so that errors are those of one rounding."""
    scores, parts, outputs, values, norms, scales = drawn(rows, counts, dtype)
    weights = []
    gradient, totals = rounded_scores.to_scores(
        scores, parts, outputs, values, norms, scales, PLAIN, by_row, lambda s, grad: weights.append((s, grad))
    )
    assert gradient.shape == tuple(scores.shape) and (gradient.by_row is not None) is by_row
    columns = gradient.by_column[:, :rows].float().mT
    if by_row:
        assert torch.equal(columns, gradient.by_row[:rows].float())
        assert not gradient.by_row[rows:].float().any()
    assert not gradient.by_column[:, rows:].float().any()
    start = 0
    for i, (a, r, scale) in enumerate(zip(parts, norms, scales)):
        d = (outputs[i] @ values[i].mT).double()
        s, total = FUNCTION.backward(a.double(), r.double(), d, scale)  # d becomes D
        transposed, grad = weights[i]
        assert grad is outputs[i]
        check(transposed.values().mT, s, VALUE, transposed.down)
        stop = start + a.shape[1]
        check(columns[:, start:stop] * gradient.down, d, GRADIENT, gradient.down)
        torch.testing.assert_close(
            totals[i].double(), total, rtol=0, atol=1e-5 * (d * a).abs().sum(-1).max().item() + 1e-30
        )
        start += aligned(a.shape[1])
        assert not columns[:, stop:start].any(), "zeros between projections"
    assert start == gradient.by_column.shape[0] and start % ALIGNMENT == 0


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_bound_holds_and_costs_no_digits(size):
    """Products of rounded factors are up to a fifth larger than those of the factors themselves."""
    scores, parts, outputs, values, norms, scales = drawn(64, (256,), torch.float32)
    outputs = [size * outputs[0]]
    values[0][3] = 30 * values[0][3]
    outputs[0][7] = values[0][3] * size  # along a value token
    into = rounded_scores.empty_gradient(scores, outputs, values, norms, scales, by_row=False)
    bound = into.bound.view(torch.float32).double()
    d = 1.2 * (outputs[0] @ values[0].mT).double()
    FUNCTION.backward(parts[0].double(), norms[0].double(), d, scales[0])
    assert d.abs().max() <= bound
    assert bound < 2.0**10 * d.abs().max()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(bad):
    scores, parts, outputs, values, norms, scales = drawn(21, (40,), torch.float32)
    spoilt = outputs[0].clone()
    spoilt[3, 4] = bad
    gradient, _ = rounded_scores.to_scores(
        scores, parts, [spoilt], values, norms, scales, PLAIN, False, lambda s, grad: None
    )
    assert gradient.values().isnan().all(), "a step with it is skipped"
    parts[0][3, 4] = bad
    assert rounded_scores.weights(parts[0], norms[0], SCALE).values()[3, 4].isnan()


def test_where_they_are_used(monkeypatch):
    monkeypatch.setattr(rounding, "usable", lambda x: True)
    x = torch.zeros(2, 2)
    assert rounded_scores.usable(FUNCTION, x) and not rounded_scores.usable(score_function("softmax"), x)
    monkeypatch.setattr(rounding, "usable", lambda x: False)
    assert not rounded_scores.usable(FUNCTION, x)
