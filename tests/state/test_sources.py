from __future__ import annotations

import pytest
import torch
from tiny import run_config

from megatron_tf.state.initialize import initial_rows
from megatron_tf.state.parameters import initial_scales, parameter_table
from megatron_tf.state.sources import InitialSource, WithWeights

MODEL = run_config().model


@pytest.mark.parametrize("name", ["embedding.weight", "blocks.1.ffn.value_tokens", "final_norm.weight"])
def test_initial_weights_are_the_initialisers_at_any_range(name):
    source, spec = InitialSource(MODEL, seed=3), parameter_table(MODEL)[name]
    whole = initial_rows(spec, 3, 0, spec.shape[0]).reshape(-1)
    for start, stop in [(0, spec.numel), (1, 3), (7, spec.numel), (5, 5)]:
        assert torch.equal(source.read(name, "weight", start, stop), whole[start:stop])
        assert torch.equal(source.read(name, "exp_avg", start, stop), torch.zeros(stop - start))
    assert source.adam_steps(name, 1, 3) == [(1, 3, 0)]
    assert source.adam_steps(name, 3, 3) == []


def test_other_weights_of_some_parameters():
    name, other = "blocks.1.ffn.value_tokens", "blocks.1.ffn.key_tokens"
    initial, weight = InitialSource(MODEL, seed=3), torch.arange(37 * 32.0).view(37, 32)
    source = WithWeights(initial, {name: weight})
    assert torch.equal(source.read(name, "weight", 30, 40), torch.arange(30.0, 40.0))
    assert torch.equal(source.read(name, "exp_avg", 30, 40), torch.zeros(10))
    assert torch.equal(source.read(other, "weight", 5, 9), initial.read(other, "weight", 5, 9))
    assert source.scales == initial.scales and source.adam_steps(name, 1, 3) == [(1, 3, 0)]


def test_initial_scales():
    assert InitialSource(MODEL, seed=3).scales == initial_scales(MODEL)
