"""Stochastic depth: how often branches are skipped, by whom, and what a block does with it."""

from __future__ import annotations

import pytest
import torch
from tiny import run_config

from megatron_tf.model import build_model
from megatron_tf.model.context import BlockContext
from megatron_tf.model.drop_path import DropPath


def test_rates_rise_with_the_depth_and_the_mean_is_one():
    scales = DropPath(0.4, 5, 7).scales(3, range(20_000))
    assert scales.shape == (5, 2, 20_000) and (scales[0] == 1).all()
    for layer, rate in enumerate((0, 0.1, 0.2, 0.3, 0.4)):
        assert (scales[layer] == 0).float().mean().item() == pytest.approx(rate, abs=0.01)
        assert scales[layer].max().item() == pytest.approx(1 / (1 - rate))
    assert scales.mean().item() == pytest.approx(1, abs=0.01)


def test_they_are_functions_of_seed_step_and_place():
    drop = DropPath(0.5, 6, 7)
    whole = drop.scales(3, range(12))
    assert torch.equal(whole, torch.cat([drop.scales(3, range(first, first + 4)) for first in (0, 4, 8)], 2))
    others = [DropPath(0.5, 6, 8).scales(3, range(12)), drop.scales(4, range(12)), drop.scales(3, range(12, 24))]
    assert not any(torch.equal(whole, other) for other in others)
    assert not torch.equal(whole[:, 0], whole[:, 1])


def test_no_rate_skips_nothing():
    assert (DropPath(0, 1, 7).scales(0, range(5)) == 1).all()


@pytest.mark.parametrize("recompute", [False, True])
def test_a_sample_without_branches_passes_as_it_is(recompute):
    model = build_model(run_config().model)
    block = model.blocks[1]
    block.recompute = recompute
    hidden = torch.randn(16, 3, 32, requires_grad=True)
    branches = torch.ones(2, 2, 3)
    branches[1, :, 1] = 0
    branches[1, 0, 2] = 2
    found, plain = block(hidden, BlockContext(branches=branches)), block(hidden)
    assert block.layer == 1
    assert torch.equal(found[:, 0], plain[:, 0]) and torch.equal(found[:, 1], hidden[:, 1])
    norm = torch.nn.functional.layer_norm(hidden, (32,), eps=1e-5)
    between = hidden + torch.tensor([1.0, 0, 2])[:, None] * block.attention(norm)
    after = block.ffn.partial(torch.nn.functional.layer_norm(between, (32,), eps=1e-5))
    torch.testing.assert_close(found[:, 2], (between + after)[:, 2])
