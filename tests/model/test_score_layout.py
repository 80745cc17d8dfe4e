"""Aligned rows and parts, whatever the numbers of tokens; and gaps that add nothing."""

from __future__ import annotations

import pytest
import torch

from megatron_tf.model.pattention import partial_pattention
from megatron_tf.model.score_layout import ALIGNMENT, clear_gaps, empty_scores, joined, split
from megatron_tf.parallel.groups import SINGLE

COUNTS = [(1077,), (16, 32), (13, 11, 37), (48, 1, 16)]


def keys_of(counts, width=3):
    return [torch.randn(n, width, generator=torch.Generator().manual_seed(n)) for n in counts]


@pytest.mark.parametrize("counts", COUNTS)
def test_rows_and_parts_are_aligned(counts):
    keys = keys_of(counts)
    x = torch.randn(5, 3)
    together = joined(keys)
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


def test_memory_with_anything_in_it_changes_no_gradient(monkeypatch):
    """What is not initialised is filled with NaN: none may reach a result."""
    original = torch.Tensor.new_empty_strided
    filled = []

    def poisoned(like, *arguments, **named):
        filled.append(original(like, *arguments, **named).fill_(torch.nan))
        return filled[-1]

    keys, values = keys_of((13, 11, 37), 8), keys_of((13, 11, 37), 8)
    x = torch.randn(6, 8, requires_grad=True)
    leaves = [x, *(t.requires_grad_() for t in (*keys, *values))]

    def gradients():
        outs = partial_pattention(x, keys, values, (2.0, 3.0, 4.0), "l2_norm_gelu", SINGLE)
        return torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)

    expected = gradients()
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", poisoned)
    poison = gradients()
    assert filled
    for gradient, reference in zip(poison, expected):
        torch.testing.assert_close(gradient, reference)
