"""Aligned rows and parts, whatever the numbers of tokens; and gaps that add nothing."""

from __future__ import annotations

import pytest
import torch

from megatron_tf.model.kernels import score_layout
from megatron_tf.model.kernels.score_layout import ALIGNMENT, clear_gaps, concatenated, empty_scores, split
from megatron_tf.model.pattention import partial_pattention
from megatron_tf.parallel.groups import SINGLE

COUNTS = [(1077,), (16, 32), (13, 11, 37), (48, 1, 16)]


def keys_of(counts, width=3):
    return [torch.randn(n, width, generator=torch.Generator().manual_seed(n)) for n in counts]


@pytest.mark.parametrize("counts", COUNTS)
def test_rows_and_parts_are_aligned(counts):
    keys = keys_of(counts)
    x = torch.randn(5, 3)
    together = concatenated(keys)
    scores = empty_scores(x, 5, together.shape[0]).addmm_(x, together.mT, beta=0)
    assert scores.stride() == (-(-together.shape[0] // ALIGNMENT) * ALIGNMENT, 1)
    parts = split(scores, keys)
    for part, k in zip(parts, keys, strict=True):
        assert part.storage_offset() % ALIGNMENT == 0
        torch.testing.assert_close(part, x @ k.mT)
    assert scores.shape[1] < sum(counts) + len(counts) * ALIGNMENT
    marked = torch.full_like(scores, torch.nan)
    for part in split(marked, keys):
        part.fill_(1.0)
    clear_gaps(marked, keys)
    assert marked.sum() == 5 * sum(counts)


@pytest.fixture
def new_memory_is_nan():
    """All that torch does not initialise is filled with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    yield lambda: torch.use_deterministic_algorithms(True, warn_only=True)
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("counts", [(13,), (1,), (13, 11, 37), (16,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_memory_with_anything_in_it_changes_nothing(new_memory_is_nan, dtype, counts):
    """A bf16 product on a CPU multiplies the column behind an odd number of them by 0, and 0 · NaN is NaN."""
    keys, values = keys_of(counts, 32), keys_of(counts, 32)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    leaves = [t.to(dtype).requires_grad_() for t in (x, *keys, *values)]

    def results():
        outs = partial_pattention(
            leaves[0], leaves[1 : len(keys) + 1], leaves[len(keys) + 1 :], [3.0] * len(keys), "l2_norm_gelu", SINGLE
        )
        return *outs, *torch.autograd.grad(sum(out.float().square().sum() for out in outs), leaves)

    expected = results()
    new_memory_is_nan()
    assert torch.empty(1).isnan()
    for got, reference in zip(results(), expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=0, atol=0)


@pytest.mark.parametrize("counts", [(13,), (1,), (13, 11, 37), (16, 5)])
def test_sizes_that_are_filled_up_change_nothing(monkeypatch, counts):
    """What GPUs do for the speed of products: outputs and all gradients, in fp64."""
    keys, values = keys_of(counts, 32), keys_of(counts, 32)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    leaves = [t.double().requires_grad_() for t in (x, *keys, *values)]

    def results():
        outs = partial_pattention(
            leaves[0], leaves[1 : len(keys) + 1], leaves[len(keys) + 1 :], [3.0] * len(keys), "l2_norm_gelu", SINGLE
        )
        return *outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)

    expected = results()
    monkeypatch.setattr(score_layout, "ALIGNED_SIZES", ("cpu",))
    assert score_layout.filled(keys[0]).shape[0] % ALIGNMENT == 0
    for found, right in zip(results(), expected, strict=True):
        assert found.shape == right.shape
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_softmax_is_not_filled_up(monkeypatch):
    """A token whose score is 0 has a weight in a softmax."""
    monkeypatch.setattr(score_layout, "ALIGNED_SIZES", ("cpu",))
    x, k, v = (t.double() for t in (torch.randn(4, 8), torch.randn(5, 8), torch.randn(5, 8)))
    (found,) = partial_pattention(x, [k], [v], [5.0], "softmax", SINGLE)
    torch.testing.assert_close(found, 5.0 * torch.softmax(x @ k.mT, -1) @ v)
