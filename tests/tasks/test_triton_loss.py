"""The loss's kernels against PyTorch's own cross-entropy in fp64; without a GPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("triton")
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.tasks import classes, triton_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts numbers off at bf16, GPUs round.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(classes, "_kernels", lambda rows: triton_loss)


def drawn(rows, columns, dtype, spread=4.0):
    generator = torch.Generator().manual_seed(columns)
    logits = spread * torch.randn(rows, columns, generator=generator)
    labels = torch.randint(0, columns, (rows,), generator=generator)
    labels[::3] = classes.IGNORED
    return logits.to(DEVICE, dtype), labels.to(DEVICE)


@pytest.mark.parametrize("columns", [1, 11, 4096, 9001])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_loss_and_gradient(kernels, columns, dtype):
    logits, labels = drawn(7, columns, dtype)
    weight = torch.linspace(0.5, 2, 7, device=DEVICE)
    wide = logits.double().requires_grad_()
    expected = F.cross_entropy(wide, labels, reduction="none", ignore_index=classes.IGNORED)
    (expected * weight).sum().backward()
    logits.requires_grad_()
    found = classes.cross_entropy(logits, labels, 0, SINGLE)
    (found * weight).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=TOLERANCE[dtype], atol=2e-6)


def test_rows_that_lie_apart_and_labels_of_other_ranks(kernels):
    """Columns 20 to 50 of a vocabulary, in memory of wider rows."""
    whole, _ = drawn(5, 64, torch.float32)
    labels = torch.tensor([19, 20, 49, 50, 33], device=DEVICE)
    own = whole[:, 20:50]
    top, total, target = triton_loss.sums(own, torch.tensor([-1, 0, 29, -1, 13], device=DEVICE))
    torch.testing.assert_close(top, own.amax(-1))
    torch.testing.assert_close(total, (own - own.amax(-1, keepdim=True)).exp().sum(-1), rtol=2e-6, atol=0)
    expected = torch.where((labels >= 20) & (labels < 50), whole.gather(-1, labels.unsqueeze(-1)).squeeze(-1), 0)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_goes_where_it_goes_in_pytorch(kernels, value):
    """Guards look for such losses; logits that are masked with -inf have no weight."""
    logits, labels = drawn(4, 40, torch.float32)
    labels.fill_(3)
    logits[1, 7] = value
    found = classes.cross_entropy(logits, labels, 0, SINGLE)
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5, equal_nan=True)
