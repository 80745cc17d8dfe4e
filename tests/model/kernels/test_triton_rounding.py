"""The GPU's kernels that round to 8 bits against PyTorch's passes; in Triton's interpreter where there is no GPU.

Every bit must be the same, so tensors are compared without a tolerance.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton")
from megatron_tf.model import rounding
from megatron_tf.model.kernels import triton_rounding

DTYPES = triton_rounding.SUPPORTED_DTYPES
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda" and torch.cuda.get_device_capability() < rounding.CAPABILITY:
    pytest.skip("this GPU has no 8-bit numbers", allow_module_level=True)


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(rounding, "usable", lambda x: True)


def compare(x, **options):
    """`rounded` by the kernels and by PyTorch, bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "usable", lambda x: False)
        expected = rounding.rounded(x, **options)
        patch.setattr(rounding, "usable", lambda x: True)
        found = rounding.rounded(x, **options)
    for name in ("by_row", "by_column"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None) == (not options.get(name, name == "by_row"))
        if ours is not None:
            assert ours.dtype == theirs.dtype and ours.is_contiguous()
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), name
    assert torch.equal(found.down.nan_to_num(7.0), expected.down.nan_to_num(7.0))
    assert found[3:] == expected[3:]
    return found


def drawn(rows, columns, dtype=torch.bfloat16, size=1.0):
    return (size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))).to(DEVICE, dtype)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (3, 17), (70, 131), (129, 300), (16, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_and_their_transpose(dtype, shape, gradient):
    """Shapes that are no multiples of 16 are padded with zeros."""
    x = drawn(*shape, dtype)
    made = compare(x, gradient=gradient, by_column=True)
    assert torch.equal(made.by_row.mT.float(), made.by_column.float())
    assert not made.by_row[shape[0] :].float().any() and not made.by_row[:, shape[1] :].float().any()
    assert made.by_row.shape == tuple(-(-size // 16) * 16 for size in shape)


@pytest.mark.parametrize("by_row", [False, True])
def test_matrices_that_lie_apart_or_by_columns(by_row):
    wide = drawn(40, 96)
    for x in (wide[:, 7:60], wide[3:30].mT, wide[:, 16:48].mT, wide[:, ::2], wide[:1, :1]):
        compare(x, by_row=by_row, by_column=not by_row)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_a_16_bit_type(dtype, gradient):
    """With a scale of 1: subnormals, ties, ±0, numbers beyond the range, infinities and NaN. For fp32, neighbours of
    all ties as well."""
    if dtype == torch.float32:
        codes = torch.arange(256, dtype=torch.uint8).view(rounding.GRADIENTS if gradient else rounding.VALUES).float()
        codes = codes[codes.isfinite()].sort().values
        ties = (codes[1:] + codes[:-1]) / 2
        around = [torch.nextafter(ties, torch.tensor(way)) for way in (math.inf, -math.inf)]
        every = torch.cat(
            [codes, ties, *around, torch.tensor([-0.0, 1e-45, -1e-45, 3e38, math.inf, -math.inf, math.nan])]
        )
    else:
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    every = torch.cat([every, every.new_zeros(-len(every) % 256)])
    x = every.to(DEVICE, dtype).view(-1, 256)
    most = 57344.0 if gradient else 448.0
    made = compare(x, gradient=gradient, bound=most / 2, by_column=True)
    assert made.down == 1
    inside = x.abs() <= most
    kind = made.by_row.dtype
    assert torch.equal(made.by_row[: len(x)][inside].view(torch.uint8), x[inside].to(kind).view(torch.uint8))
    beyond = x.isfinite() & ~inside
    numbers = made.by_row[: len(x)].float()
    assert torch.equal(numbers[beyond], x.float().sign()[beyond] * most) and numbers[~x.isfinite()].isnan().all()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_from_the_smallest_to_the_largest_numbers(dtype, gradient):
    facts = torch.finfo(dtype)
    for size in (0.0, facts.smallest_normal / 8, facts.tiny, 1e-4, 1.0, 447.0, 448.0, 449.0, facts.max / 8):
        x = drawn(5, 40, dtype).clamp(-1, 1) * size
        x[2] = -0.0
        made = compare(x, gradient=gradient, by_column=True)
        if size == 0:
            assert not made.values().any()
        if size >= 1e-4:
            bound = 2.0**-3 if gradient else 2.0**-4
            least = x.double().abs().max() * 2.0**-13
            wide, ours = x.double(), made.values().double()
            assert ((ours - wide).abs() <= bound * wide.abs().clamp(min=least)).all()


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(dtype, bad):
    """With a scale from the matrix all of it is NaN, with a known one that element is."""
    x = drawn(30, 50, dtype)
    x[20, 41] = bad
    for gradient in (False, True):
        assert compare(x, gradient=gradient, by_column=True).values().isnan().all()
        values = compare(x, gradient=gradient, by_column=True, bound=5.0).values()
        assert values[20, 41].isnan() and values.isnan().sum() == 1


def test_the_scale_stays_on_the_device_and_finds_the_largest_everywhere(kernels):
    """Wherever it is: in the last row, the last column, the middle of a block."""
    rows, columns = 2 * triton_rounding.SEARCHED_ROWS + 3, triton_rounding.SEARCHED_COLUMNS + 5
    for place in ((0, 0), (rows - 1, columns - 1), (rows - 1, 0), (17, 255), (16, 256)):
        x = torch.full((rows, columns), 0.25, device=DEVICE)
        x[place] = -100.0
        assert rounding.largest_bits(x).view(torch.float32) == 100.0
        assert rounding.rounded(x).down.device.type == DEVICE


def test_compiled_without_a_graph_break(kernels):
    def both(x):
        made = rounding.rounded(x, gradient=True, by_column=True)
        return made.by_row.float(), made.by_column.float(), made.down

    x = drawn(20, 40, torch.float32)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(x), both(x)):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(("capability", "native", "dtype", "there"), [
    ((8, 9), None, torch.bfloat16, True), ((9, 0), None, torch.float32, True), ((8, 6), None, torch.bfloat16, False),
    ((9, 0), "0", torch.bfloat16, False), ((9, 0), None, torch.float64, False),
])  # fmt: skip
def test_where_they_are_used(monkeypatch, capability, native, dtype, there):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.delenv("MEGATRON_TF_NATIVE", raising=False)
    if native is not None:
        monkeypatch.setenv("MEGATRON_TF_NATIVE", native)
    assert rounding._has_kernels(0, dtype) is there
    assert not rounding.usable(torch.empty(2, 2, dtype=dtype))
