"""Sampling from known logits, at every temperature a user can type."""

from __future__ import annotations

import math
import re

import pytest
import torch

from megatron_tf.errors import ArgumentError, CheckpointError
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
    with pytest.raises(CheckpointError, match="after 1 token are not finite: its training diverged. Use an earlier"):
        sample(logits=torch.tensor([0.0, bad]), temperature=temperature)


REFUSED = {
    "no prompts": ({"prompts": []}, "prompts: there are none"),
    "an empty prompt": ({"prompts": [[1], []]}, "prompts[1]: is empty"),
    "text": ({"prompts": ["ab"]}, "prompts[0][0]: the text 'a'"),
    "an id below 0": ({"prompts": [[1, -2]]}, "prompts[0][1]: the number -2"),
    "tokens below 0": ({"num_tokens": -1}, "num_tokens: the number -1"),
    "half a token": ({"num_tokens": 1.5}, "num_tokens: the number 1.5"),
    "no context": ({"context": 0}, "context: the number 0"),
    "an end below 0": ({"end": -1}, "end: the number -1"),
    "a temperature below 0": ({"temperature": -0.5}, "temperature: the number -0.5"),
    "temperature nan": ({"temperature": math.nan}, "temperature: the number nan"),
    "an infinite temperature": ({"temperature": math.inf}, "temperature: the number inf"),
    "temperature as text": ({"temperature": "hot"}, "temperature: the text 'hot'"),
    "top_k below 0": ({"top_k": -1}, "top_k: the number -1"),
    "top_p of 0": ({"top_p": 0.0}, "top_p: the number 0.0"),
    "top_p above 1": ({"top_p": 1.01}, "top_p: the number 1.01"),
    "a seed below 0": ({"seed": -1}, "seed: the number -1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_out_of_range_is_refused_before_the_first_token_is_asked_for(name):
    changes, message = REFUSED[name]
    with pytest.raises(ArgumentError, match="^" + re.escape(message)):
        generate(constant(LOGITS), **{"prompts": [[0]], "num_tokens": 1, "context": 4, **changes})


def test_a_model_of_another_kind_is_named():
    tokens = generate(lambda ids, padding: torch.zeros(*ids.shape, 4), [[0]], num_tokens=1, context=4)
    with pytest.raises(ArgumentError, match=r"model: gives \[1, 1, 4\] for 1 prompts.*CachedModel"):
        next(tokens)
