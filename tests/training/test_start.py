"""What a run knows of the stages before it, from its growth history."""

from __future__ import annotations

import pytest

from megatron_tf.estimate import flops_per_token
from megatron_tf.training.start import Progress, Start


@pytest.fixture
def start(config):
    model = config(model={"parameter_tokens": {"qkv": 30, "proj": 20, "ffn": 90}}).model
    history = (
        {"tokens": 1000, "from": {"qkv": 13, "proj": 11, "ffn": 37}, "to": {"qkv": 20, "proj": 20, "ffn": 60}},
        {"tokens": 1500, "from": {"qkv": 20, "proj": 20, "ffn": 60}, "to": {"qkv": 30, "proj": 20, "ffn": 90}},
    )
    return model, Start(None, "", Progress(step=3, samples=9, tokens=1700), history)


def test_tokens_and_flops_of_earlier_stages(start):
    model, grown = start
    assert (grown.earlier_tokens, grown.run_tokens) == (1500, 200)
    sizes = [
        model.model_copy(update={"parameter_tokens": model.parameter_tokens.model_copy(update=counts)})
        for counts in ({"qkv": 13, "proj": 11, "ffn": 37}, {"qkv": 20, "proj": 20, "ffn": 60})
    ]
    expected = 1000 * flops_per_token(sizes[0]) + 500 * flops_per_token(sizes[1])
    assert grown.earlier_flops(model) == expected


def test_new_tokens_are_those_of_the_last_growth(start):
    model, grown = start
    first = grown.first_new(model)
    assert first["blocks.0.ffn.key_tokens"] == 60 * model.hidden_size
    assert first["blocks.1.attention.query.value_tokens"] == 20 * model.hidden_size
    assert first["blocks.0.attention.proj.key_tokens"] == 20 * model.hidden_size  # all of them: none is new
    assert "embedding.weight" not in first


def test_a_run_that_did_not_grow(start):
    model, _ = start
    fresh = Start(None, "", Progress(3, 9, 300))
    assert (fresh.earlier_tokens, fresh.run_tokens, fresh.earlier_flops(model), fresh.first_new(model)) == (
        0,
        300,
        0,
        {},
    )
