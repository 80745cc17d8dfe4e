from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tf.benchmark.models import FormulaPattention, equal_transformer, with_formula
from megatron_tf.config import load_config
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.model import build_model

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("name", ["tiny", "124M", "354M", "757M", "1.4B", "pile_150M", "pile_1.5B"])
def test_the_transformer_has_as_many_parameters_layers_and_channels_a_head(name):
    model = load_config(CONFIGS / f"{name}.yml").model
    transformer = equal_transformer(model)
    assert num_parameters(transformer) == pytest.approx(num_parameters(model), rel=0.01)
    assert transformer.num_layers == model.num_layers
    assert transformer.hidden_size // transformer.num_attention_heads == model.hidden_size // model.num_attention_heads
    assert transformer.hidden_size >= model.hidden_size
    assert 2 * transformer.hidden_size < transformer.ffn_hidden_size < 6.1 * transformer.hidden_size


def test_the_papers_base_model_has_a_transformer_of_its_own_width():
    transformer = equal_transformer(load_config(CONFIGS / "124M.yml").model)
    assert transformer == load_config(CONFIGS / "transformer_124M.yml").model


def test_plain_formulas_compute_the_same_model():
    config = load_config(CONFIGS / "tiny.yml", ["model.seq_length=16", "model.num_layers=2"]).model
    fast, plain = build_model(config, dtype=torch.float64), with_formula(build_model(config), "plain").double()
    ids = torch.arange(32).view(2, 16)
    for model in (fast, plain):
        model(ids).square().sum().backward()
    for (name, one), other in zip(fast.named_parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-8, msg=name)


def test_every_projection_is_the_formula():
    config = load_config(CONFIGS / "tiny.yml", ["model.seq_length=16", "model.num_layers=2"]).model
    model = with_formula(build_model(config), "plain")
    tokens = []
    for module in model.modules():
        if isinstance(module, FormulaPattention):
            formula = module.formula
            module.formula = lambda x, keys, values, own=formula: (tokens.append(len(keys)), own(x, keys, values))[1]
    model(torch.arange(32).view(2, 16))
    assert tokens == 2 * [128, 128, 128, 128, 512]
