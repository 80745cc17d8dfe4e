from __future__ import annotations

import pytest
import torch
from distributed import spawn

from megatron_tf.parallel.groups import SINGLE
from megatron_tf.state.parameters import shard_range
from megatron_tf.tasks.classes import argmax


def logits():
    """[5, 3, 11], of few values, so that many are equal."""
    return torch.randint(0, 3, (5, 3, 11), generator=torch.Generator().manual_seed(0)).float()


def first_of_the_largest(z):
    return torch.tensor([[row.tolist().index(max(row)) for row in rows] for rows in z])


def test_the_first_of_equal_ones():
    assert torch.equal(argmax(logits(), 0, SINGLE), first_of_the_largest(logits()))


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded(ranks):
    spawn(_sharded, ranks)


def _sharded(group):
    start, stop = shard_range(11, group.size, group.rank)
    assert torch.equal(argmax(logits()[..., start:stop], start, group), first_of_the_largest(logits()))
