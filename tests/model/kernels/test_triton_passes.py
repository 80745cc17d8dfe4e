"""The GPU's kernels in Triton's interpreter against the same passes in fp64; on a GPU itself where there is one."""

from __future__ import annotations

import pytest
import torch

from megatron_tf.activations.function import score_function
from megatron_tf.model.kernels import triton_passes

FUNCTION = score_function("l2_norm_gelu")
ROWS, SCALE = 7, 5.0
# Of rounding once to the type. Triton's interpreter cuts bf16 off instead of rounding it, which is off by up to twice
# that.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8 if torch.cuda.is_available() else 2**-7}


@pytest.fixture(scope="module")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def tensors(dtype, tokens, device):
    """Columns of a wider matrix, as those of one of several projections are; a row of zeros; a large entry."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, ROWS, 2 * tokens, generator=generator)
    wide[0, 3] = 0
    wide[0, 4, tokens] = 40.0
    scores, gradient = wide.to(device, dtype)[..., tokens:].unbind()
    return scores, gradient


def columns(device, count):
    """[rows, 1] each, with distance between rows."""
    return torch.full((ROWS, count), torch.nan, device=device).split(1, -1)


def run(scores, gradient):
    """What the kernels compute, split and whole."""
    r, total, whole_r, third_total, product = columns(scores.device, 5)
    forward, s, whole_forward, whole_s, third_s = (torch.full_like(scores.contiguous(), torch.nan) for _ in range(5))
    d, whole_d, third_d = gradient.clone(), gradient.clone(), gradient.clone()
    triton_passes.norm(scores, r)
    triton_passes.weights(scores, r, forward, SCALE)
    triton_passes.backward(scores, r, d, s, total, SCALE)
    triton_passes.backward_with_product(scores, r, third_d, third_s, third_total, product, SCALE)
    for split, third in ((d, third_d), (s, third_s), (total, third_total)):
        assert torch.equal(split.nan_to_num(7), third.nan_to_num(7))
    triton_passes.couple(scores, r, total, d)
    triton_passes.norm_and_weights(scores, whole_r, whole_forward, SCALE)
    triton_passes.backward_and_couple(scores, r, whole_d, whole_s, SCALE)
    pairs = {"r": (r, whole_r), "forward": (forward, whole_forward), "s": (s, whole_s), "d": (d, whole_d)}
    return {
        "total": total,
        "product": product,
        **{f"{way}{name}": x for name, both in pairs.items() for way, x in zip(("", "whole "), both)},
    }


@pytest.mark.parametrize("tokens", [1, 203, 700])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_agrees_with_fp64(device, monkeypatch, dtype, tokens):
    # So that rows of one block, of several and of a part are there.
    for name in ("SINGLE", "FORWARD", "BACKWARD"):
        monkeypatch.setattr(triton_passes, name, (triton_passes.Block(None, 256, 256),))
    check_against_fp64(dtype, tokens, device)


@pytest.mark.parametrize("held", [True, False])
def test_rows_at_the_ends_of_the_range(device, monkeypatch, held):
    """As in test_fused_passes.py: no NaN for rows whose squares are lost, and NaN for one whose squares overflow."""
    for name in () if held else ("SINGLE", "FORWARD", "BACKWARD"):
        monkeypatch.setattr(triton_passes, name, (triton_passes.Block(None, 256, 256),))
    scores, gradient = tensors(torch.float32, 700, device)
    for row, power in ((0, -72), (1, -66), (2, 66)):
        scores[row] *= 2.0**power
    found = run(scores, gradient)
    for name in ("forward", "whole forward", "s", "d", "whole d"):
        assert found[name][:2].isfinite().all() and not found[name][:2].any(), name
        assert found[name][2].isnan().all() and found[name][4].isfinite().all(), name


@pytest.mark.parametrize("tokens", [1, 203, 700])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_held_in_registers_agree_with_fp64(device, dtype, tokens):
    check_against_fp64(dtype, tokens, device)


# bytes of fp32 rows: up to each limit, and more
@pytest.mark.parametrize("tokens", [2048, 2049, 5120, 5121, 8193, 17000, 18500])
def test_agrees_with_fp64_in_blocks_of_each_size(device, tokens):
    check_against_fp64(torch.float32, tokens, device)


def check_against_fp64(dtype, tokens, device):
    scores, gradient = tensors(dtype, tokens, device)
    a, d = scores.double(), gradient.double()
    r = FUNCTION.statistic(a)
    s, total, product = FUNCTION.backward_with_product(a, r, d, SCALE)
    rounded = d.clone()  # D, which the split passes round before A · T/r² is taken from it
    FUNCTION.couple(a, r, total, d, SCALE)
    expected = {"r": r, "total": total, "product": product, "forward": s, "s": s, "d": d}
    for name, actual in run(scores, gradient).items():
        exact = expected[name.removeprefix("whole ")]
        scale = exact.abs().max().item() + (rounded.abs().max().item() if name.endswith("d") else 0)
        if name == "total":  # a sum of terms that may cancel
            scale = (rounded * a).abs().sum(-1).max().item()
        tolerance = TOLERANCE[torch.float32 if actual.dtype == torch.float32 else dtype]
        torch.testing.assert_close(
            actual.double(), exact, rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(device, value):
    scores, gradient = (tensor.clone() for tensor in tensors(torch.float32, 203, device))
    scores[5, 2] = value
    found = run(scores, gradient)
    for name in ("forward", "whole forward", "d", "whole d"):
        assert not found[name][5].isfinite().all() and found[name][6].isfinite().all(), name
