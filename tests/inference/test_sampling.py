"""Sampling from known logits, at every temperature a user can type."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_tf.errors import CheckpointError
from megatron_tf.inference.sampling import generate

LOGITS = torch.tensor([0.0, 3.0, 2.0, -50.0])


def constant(logits):
    return lambda ids, padding: logits.expand(ids.shape[0], -1)


def sample(count=200, logits=LOGITS, **options):
    return [token for (token,) in generate(constant(logits), [[0]], num_tokens=count, context=4, **options)]


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


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, {1}), (0.4, {1}), (0.6, {1, 2}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p(top_p, kept):
    """Shares of 0.5, 0.3, 0.15 and 0.05: the fewest tokens that reach top_p, the one that crosses it included."""
    logits = torch.tensor([0.15, 0.5, 0.3, 0.05]).log()
    assert set(sample(400, logits, temperature=1.0, top_p=top_p)) == kept


def test_top_p_is_a_share_of_what_top_k_leaves():
    logits = torch.tensor([0.3, 0.4, 0.3]).log()  # the first two have all of it, the likeliest 0.57
    assert set(sample(400, logits, temperature=1.0, top_k=2, top_p=0.5)) == {1}


def test_each_row_has_draws_of_its_own():
    alone = sample(50, temperature=1.0, seed=4)
    together = list(generate(constant(LOGITS), [[0], [0], [0]], num_tokens=50, context=4, temperature=1.0, seed=3))
    rows = [list(row) for row in zip(*together)]
    assert rows[1] == alone and rows[0] != rows[1] != rows[2]


def count_up(seen):
    def model(ids, padding):
        seen.append([row[pad:].tolist() for row, pad in zip(ids, padding)])
        return torch.nn.functional.one_hot(ids[:, -1] + 1, 20).float()

    return model


def test_the_model_sees_the_last_ids_only_and_the_end_is_not_given():
    seen = []
    assert list(generate(count_up(seen), [[1, 2, 3]], num_tokens=50, context=2, end=7)) == [[4], [5], [6]]
    assert seen == [[[2, 3]], [[3, 4]], [[4, 5]], [[5, 6]]]


def test_rows_of_different_lengths_end_when_they_end():
    seen = []
    found = list(generate(count_up(seen), [[5], [1, 2, 3]], num_tokens=50, context=3, end=7))
    assert found == [[6, 4], [None, 5], [None, 6]]
    assert seen[:3] == [[[5], [1, 2, 3]], [[5, 6], [2, 3, 4]], [[5, 6, 7], [3, 4, 5]]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_whose_training_diverged(bad, temperature):
    with pytest.raises(CheckpointError, match="after 1 tokens are not finite: its training diverged. Use an earlier"):
        sample(logits=torch.tensor([0.0, bad]), temperature=temperature)
