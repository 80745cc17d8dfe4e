"""Sampling from known logits, at every temperature a user can type."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_tf.errors import CheckpointError
from megatron_tf.inference.sampling import generate

LOGITS = torch.tensor([0.0, 3.0, 2.0, -50.0])


def constant(logits):
    return lambda ids: logits.expand(1, ids.shape[1], -1)


def sample(count=200, logits=LOGITS, **options):
    generator = torch.Generator().manual_seed(0)
    return list(generate(constant(logits), [0], num_tokens=count, context=4, generator=generator, **options))


def test_greedy_takes_the_likeliest():
    assert sample(5) == [1] * 5


@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3])
def test_a_temperature_near_0_is_greedy(temperature):
    assert sample(20, temperature=temperature) == [1] * 20
    assert set(sample(200, torch.tensor([1e30, 0.0, 1e30]), temperature=temperature)) == {0, 2}


def test_shares_follow_the_temperature():
    found = sample(4000, temperature=2.0)
    weights = [math.exp(logit / 2) for logit in LOGITS.tolist()]
    for token in range(4):
        assert found.count(token) / 4000 == pytest.approx(weights[token] / sum(weights), abs=0.03)
    assert set(sample(200, temperature=1e300)) == {0, 1, 2, 3}


@pytest.mark.parametrize(("top_k", "kept"), [(1, {1}), (2, {1, 2}), (10**30, {0, 1, 2, 3}), (0, {0, 1, 2, 3})])
def test_top_k(top_k, kept):
    assert set(sample(400, temperature=100.0, top_k=top_k)) == kept


def test_the_model_sees_the_last_ids_only_and_the_end_is_not_given():
    seen = []

    def count_up(ids):
        seen.append(ids[0].tolist())
        return torch.nn.functional.one_hot(ids + 1, 10).float()

    assert list(generate(count_up, [1, 2, 3], num_tokens=50, context=2, end=7)) == [4, 5, 6]
    assert seen == [[2, 3], [3, 4], [4, 5], [5, 6]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_training_diverged(bad, temperature):
    with pytest.raises(CheckpointError, match="after 1 tokens are not finite: its training diverged. Use an earlier"):
        sample(logits=torch.tensor([0.0, bad]), temperature=temperature)
