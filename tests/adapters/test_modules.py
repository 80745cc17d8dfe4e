from __future__ import annotations

import pytest
import torch
from decoders import ARCHITECTURES, WITHOUT_MLP, decoder, fill, token_ids
from peft import get_peft_model
from torch import nn

from megatron_tf.adapters import PattentionConfig
from megatron_tf.adapters.modules import find_places, select, select_named
from megatron_tf.errors import ArgumentError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_at_the_modules_of_each_architecture(name, dtype):
    base, ids = decoder(name).to(dtype), token_ids()
    parameters = {name: parameter.clone() for name, parameter in base.named_parameters()}
    with torch.no_grad():
        before = base(ids).logits
        model = get_peft_model(base, PattentionConfig(num_tokens=4))
        assert len(model.base_model.targeted_module_names) == 4
        assert torch.equal(model(ids).logits, before)
    model(ids, labels=ids).loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(parameter.grad.isfinite().all() for parameter in trained.values())
    # behind a value of 0 no key has a gradient; in the next step it has
    assert all(bool(parameter.grad.any()) == ("value_tokens" in name) for name, parameter in trained.items())
    fill(model)
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, before)
    assert all(torch.equal(parameter, dict(base.named_parameters())[name]) for name, parameter in parameters.items())


@pytest.mark.parametrize("name", WITHOUT_MLP)
def test_architectures_without_mlp_modules_are_refused_with_what_they_have(name):
    with pytest.raises(ArgumentError, match="has no mlp module in its layers.*'attention'.*'linear'"):
        get_peft_model(decoder(name), PattentionConfig())


@pytest.mark.parametrize("name", ["Llama", "GPT2", "OPT"])
def test_each_linear_layer_may_have_a_branch(name):
    base, ids = decoder(name), token_ids()
    with torch.no_grad():
        before = base(ids).logits
        model = get_peft_model(base, PattentionConfig(num_tokens=4, modules="linear"))
        assert torch.equal(model(ids).logits, before)
        fill(model)
        assert not torch.equal(model(ids).logits, before)
    linear = [place for place in find_places(decoder(name)).values() if place.kind == "linear"]
    assert len(model.base_model.targeted_module_names) == len(linear) >= 8
    assert set(model.base_model.targeted_module_names) == {place.name for place in linear}


def test_widths_of_linear_layers():
    places = find_places(decoder("Llama"))
    assert (places["model.layers.1.mlp.down_proj"].d_in, places["model.layers.1.mlp.down_proj"].d_out) == (48, 32)
    assert places["model.layers.0.self_attn.k_proj"].d_out == 16
    assert places["model.layers.0.mlp"].argument == "x" and places["model.layers.0.self_attn"].kind == "attention"


def test_modules_by_name():
    model = decoder("Llama")
    assert [place.name for place in select_named(model, ["mlp"])] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [place.d_out for place in select_named(model, ["layers.1.self_attn.v_proj"])] == [16]
    for targets, message in (
        (["q_porj"], r"'q_porj' is no attention module, MLP or linear layer .* Choose of q_proj"),
        (["embed_tokens"], "'embed_tokens' is no attention module"),
        (["input_layernorm"], "'input_layernorm' is no attention module"),
        (["model.layers.0"], "'model.layers.0' is no attention module"),
        (["mlp", "up_proj"], "mlp.up_proj is within another target"),
    ):
        with pytest.raises(ArgumentError, match=message):
            select_named(model, targets)


def test_what_is_no_decoder_or_no_kind_is_refused():
    with pytest.raises(ArgumentError, match="Linear has no configuration with num_hidden_layers"):
        find_places(nn.Linear(2, 2))
    for kinds, message in (
        (["ffn"], "'ffn' is no kind of module. Choose of attention, mlp, linear or pattention"),
        (["mlp", "linear"], "Give attention, mlp or both, or linear alone"),
        ([], "Give attention, mlp or both"),
    ):
        with pytest.raises(ArgumentError, match=message):
            select(decoder(), kinds)
    model = decoder()
    model.twin = nn.ModuleList(nn.ModuleList([nn.Linear(2, 2)]) for _ in range(2))
    with pytest.raises(ArgumentError, match=r"one list of 2 modules.* 2 \(model.layers, twin\)"):
        find_places(model)
