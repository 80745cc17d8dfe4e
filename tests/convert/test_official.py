from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tf.config.load import load_config
from megatron_tf.convert.official import (
    PUBLISHED,
    check_official,
    known_model,
    load_official_state_dict,
    recorded_problems,
)
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.model import build_model
from megatron_tf.state.parameters import parameter_table

CONFIGS = Path(__file__).parents[2] / "configs"
ARGUMENTS = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 1, "max_position_embeddings": 4,
             "padded_vocab_size": 16}  # fmt: skip


def shapes_of(model):
    return {spec.official_name: spec.shape for spec in parameter_table(model).values()}


FILES = ("pile_150M", "pile_450M", "pile_900M", "pile_1.5B", "354M_openwebtext2", "757M_openwebtext2")


@pytest.mark.parametrize("name, file", list(zip(PUBLISHED, FILES)))
def test_published_models_are_known_by_their_shapes(name, file):
    model = load_config(CONFIGS / f"{file}.yml").model
    assert PUBLISHED[name] == model
    assert known_model(shapes_of(model), {}) == (model, f"{name}, known by its shapes")


def test_another_model_is_known_by_what_its_trainer_recorded(model):
    assert known_model(shapes_of(model), ARGUMENTS)[0] == model
    for missing in ("num_attention_heads", "max_position_embeddings"):
        with pytest.raises(CheckpointError, match="num_layers 2, hidden_size 8.*give --config"):
            known_model(shapes_of(model), {**ARGUMENTS, missing: None})


def test_recorded_heads_that_no_network_has(model):
    with pytest.raises(
        ConfigError, match="hidden_size: 8 is not a multiple of model.num_attention_heads 3. Set it to 6"
    ):
        known_model(shapes_of(model), {**ARGUMENTS, "num_attention_heads": 3})


def test_a_published_shape_with_other_heads_is_not_that_model():
    model = PUBLISHED["TokenFormer-150M, The Pile"].model_copy(update={"num_attention_heads": 6})
    recorded = {"num_attention_heads": 6, "max_position_embeddings": 2048}
    assert known_model(shapes_of(model), recorded)[0] == model


def test_a_published_shape_with_another_vocabulary_is_not_that_model():
    model = PUBLISHED["TokenFormer-150M, The Pile"].model_copy(update={"vocab_size": 32000})
    with pytest.raises(CheckpointError, match="give --config"):
        known_model(shapes_of(model), {})


def test_what_the_trainer_recorded_must_fit(model):
    assert recorded_problems(model, ARGUMENTS) == recorded_problems(model, {}) == []
    (problem,) = recorded_problems(model, {**ARGUMENTS, "num_attention_heads": 4})
    assert problem == "model.num_attention_heads is 1, and was 4 in the training of these weights"


def test_every_name_and_shape_is_checked(model):
    whole = shapes_of(model)
    check_official(whole, model)
    value = "sequential.3.mlp.value_param_tokens"
    cases = {
        f"missing tensor {value}": {name: shape for name, shape in whole.items() if name != value},
        "unknown tensor sequential.6.final_linear.weight": {**whole, "sequential.6.final_linear.weight": (16, 8)},
        f"{value} has shape [7, 9], the model wants [7, 8]": {**whole, value: (7, 9)},
    }
    for message, shapes in cases.items():
        with pytest.raises(CheckpointError) as caught:
            check_official(shapes, model)
        assert f"\n  - {message}\n" in str(caught.value)
    with pytest.raises(CheckpointError, match="and 15 more"):
        check_official({name: shape for name, shape in whole.items() if "norm" in name}, model)


@pytest.mark.parametrize("change, message", [
    ({"vocab_size": 24}, "model.vocab_size is 24, the weights have 16 rows: another tokenizer"),
    ({"num_layers": 3}, "model.num_layers is 3, the weights have 2"),
    ({"hidden_size": 16}, "model.hidden_size is 16, the weights have 8"),
])  # fmt: skip
def test_a_model_of_another_size_is_one_line(model, change, message):
    with pytest.raises(CheckpointError) as caught:
        check_official(shapes_of(model), model.model_copy(update=change))
    assert str(caught.value).count("\n  - ") == 1 and f"\n  - {message}" in str(caught.value)


def test_a_layer_that_is_missing_is_named(model):
    shapes = {name: shape for name, shape in shapes_of(model).items() if not name.startswith("sequential.3.")}
    with pytest.raises(CheckpointError, match="missing tensor sequential.3.attention.query.key_param_tokens"):
        check_official(shapes, model)


def test_weights_of_something_else(model):
    for shapes in ({"transformer.wte.weight": (16, 8)}, {}):
        with pytest.raises(CheckpointError, match="not official TokenFormer weights"):
            known_model(shapes, {})


def test_nothing_is_copied_unless_all_fits(model, weights):
    network = build_model(model)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    name = next(iter(weights))
    with pytest.raises(CheckpointError, match="unknown tensor more"):
        load_official_state_dict({**weights, "more": torch.zeros(1)}, network)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    load_official_state_dict(weights, network)
    assert torch.equal(network.embedding.weight, weights[name])
