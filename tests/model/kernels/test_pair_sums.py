"""The sum over the slots against fp64: PyTorch's, and the GPU's kernel in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_tf.model.grouped import assign
from megatron_tf.model.kernels import pair_sums

ROWS, SLOTS = 9, 5
# Of rounding once to the type. Triton's interpreter cuts bf16 off instead of rounding it, which is off by up to twice
# that.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8 if torch.cuda.is_available() else 2**-7}


def products_and_places(dtype: torch.dtype, width: int) -> tuple[Tensor, Tensor]:
    """Columns of a wider matrix, as grouped products may be; one entry is large."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    wide = torch.full((ROWS * SLOTS, width + 3), torch.nan)
    wide[:, :width] = torch.randn(ROWS * SLOTS, width, generator=generator)
    wide[4, width - 1] = 40.0
    places = assign(torch.randint(0, 3, (ROWS, SLOTS), generator=generator), 3).places
    return wide.to(device, dtype)[:, :width], places.to(device)


def check(found: Tensor, exact: Tensor) -> None:
    atol = TOLERANCE[found.dtype] * exact.abs().max().item()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=atol)


# one number a pair, as T is; a part of a block, whole blocks, and both
@pytest.mark.parametrize("width", [1, 203, 512, 700])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_kernel_agrees_with_fp64(dtype, width):
    triton_pair_sums = pytest.importorskip("megatron_tf.model.kernels.triton_pair_sums")
    products, places = products_and_places(dtype, width)
    exact = products.double()[places.long()].sum(1)
    wide = torch.full((ROWS, width + 3), torch.nan, dtype=dtype, device=products.device)
    found = wide[:, :width]
    triton_pair_sums.sum_of_pairs(products, places, found, add=False)
    check(found, exact)
    before = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(1)).to(found)
    found.copy_(before)
    triton_pair_sums.sum_of_pairs(products, places, found, add=True)
    check(found, exact + before.double())
    assert wide[:, width:].isnan().all()
    triton_pair_sums.sum_of_pairs(products, places[:0], found[:0], add=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_without_the_kernel_agrees_with_fp64(dtype):
    products, places = (tensor.cpu() for tensor in products_and_places(dtype, 203))
    exact = products.double()[places.long()].sum(1)
    found = pair_sums.sum_of_pairs(products, places)
    check(found, exact)
    before = torch.randn(ROWS, 203, generator=torch.Generator().manual_seed(1)).to(dtype)
    total = before.clone()
    pair_sums.add_sum_of_pairs(products, places, total)
    torch.testing.assert_close(total, before + found, rtol=0, atol=0)


def test_it_is_for_gpus_and_can_be_disabled(monkeypatch):
    pytest.importorskip("triton")
    assert pair_sums._has_kernel("cuda", torch.bfloat16) and not pair_sums._has_kernel("cpu", torch.bfloat16)
    assert not pair_sums._has_kernel("cuda", torch.float64)
    monkeypatch.setenv("MEGATRON_TF_NATIVE", "0")
    assert not pair_sums._has_kernel("cuda", torch.bfloat16)
