"""What the public functions of the model refuse, and what they convert."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatron_tf.config.sections.model import Model, ParameterTokens
from megatron_tf.errors import ArgumentError, ConfigError, UserError
from megatron_tf.model import Pattention, TokenFormer, build_model, pattention
from megatron_tf.model.attention import document_starts
from megatron_tf.model.checks import check_pattention, check_starts
from megatron_tf.state.parameters import default_scale, initial_scales
from megatron_tf.tasks.language_model.checks import checked_ids

X, KEYS, VALUES = torch.ones(3, 8), torch.ones(12, 8), torch.ones(12, 5)
META = torch.ones(3, 8, device="meta")


def config(**changes) -> Model:
    tokens = ParameterTokens(qkv=12, proj=12, ffn=20)
    sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "seq_length": 8, "vocab_size": 50}
    return Model(**{**sizes, "parameter_tokens": tokens, **changes})


def refusal(call) -> str:
    with pytest.raises(ArgumentError) as raised:
        call()
    assert isinstance(raised.value, (UserError, ValueError))
    return str(raised.value)


CALLS = {
    "an activation of others": (
        {"activation": "relu"},
        ["activation", "'relu'", "l2_norm_gelu, gelu_l2_norm, softmax"],
    ),
    "an activation misspelt": ({"activation": "soft_max"}, ["Did you mean softmax?"]),
    "no activation": ({"activation": None}, ["activation", "None"]),
    "a scale below 0": ({"scale": -1.0}, ["scale", "-1.0", "above 0"]),
    "a scale of 0": ({"scale": 0}, ["scale", "0", "above 0"]),
    "a scale of nan": ({"scale": math.nan}, ["scale", "nan"]),
    "an infinite scale": ({"scale": math.inf}, ["scale", "inf"]),
    "a scale beyond all types": ({"scale": 10**5000}, ["scale", "bits", "1e30"]),
    "a scale that is a tensor": ({"scale": torch.ones(())}, ["scale", "a Tensor"]),
    "a scale that is text": ({"scale": "3"}, ["scale", "'3'"]),
    "no tensor": ({"x": [[1.0] * 8]}, ["x", "a list", "torch.as_tensor"]),
    "ids": ({"x": torch.ones(3, 8, dtype=torch.int64)}, ["x", "int64", "embedding", "x.float()"]),
    "booleans": ({"x": torch.ones(3, 8, dtype=torch.bool)}, ["x", "bool"]),
    "complex numbers": ({"x": torch.ones(3, 8, dtype=torch.complex64)}, ["x", "complex64", "view_as_real"]),
    "integer tokens": ({"key_tokens": KEYS.int()}, ["key_tokens", "int32", "float32"]),
    "another width": ({"x": torch.ones(3, 7)}, ["x", "[3, 7]", "[12, 8]", "[..., 8]"]),
    "a number": ({"x": torch.ones(())}, ["x", "[]"]),
    "no tokens": ({"key_tokens": KEYS[:0], "value_tokens": VALUES[:0]}, ["key_tokens", "[0, 8]"]),
    "tokens without channels": ({"value_tokens": VALUES[:, :0]}, ["value_tokens", "[12, 0]"]),
    "tokens of layers": ({"key_tokens": KEYS[None]}, ["key_tokens", "[1, 12, 8]"]),
    "fewer values": ({"value_tokens": VALUES[:11]}, ["value_tokens", "11", "12"]),
    "values of another type": ({"value_tokens": VALUES.double()}, ["value_tokens", "float64", "float32"]),
    "another device": ({"x": META}, ["x", "meta", "cpu", "x.to('cpu')"]),
    "values on another device": ({"value_tokens": VALUES.to("meta")}, ["value_tokens", "meta", "cpu"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_refused_by_pattention(name):
    changes, fragments = CALLS[name]
    said = refusal(lambda: pattention(**{"x": X, "key_tokens": KEYS, "value_tokens": VALUES, **changes}))
    assert [fragment for fragment in fragments if fragment not in said] == [], said


LAYERS = {
    "no tokens": ((0, 8, 8), {}, ["num_tokens", "the number 0", "at least 1"]),
    "tokens below 0": ((-3, 8, 8), {}, ["num_tokens", "-3"]),
    "no input": ((4, 0, 8), {}, ["d_in", "0"]),
    "no output": ((4, 8, 0), {}, ["d_out", "0"]),
    "half a token": ((4.5, 8, 8), {}, ["num_tokens", "4.5", "whole number"]),
    "a truth value": ((True, 8, 8), {}, ["num_tokens", "True"]),
    "an activation": ((4, 8, 8), {"activation": "nonsense"}, ["activation", "'nonsense'"]),
    "a scale": ((4, 8, 8), {"scale": -math.inf}, ["scale", "-inf"]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_refused_by_a_layer(name):
    sizes, options, fragments = LAYERS[name]
    said = refusal(lambda: Pattention(*sizes, **options))
    assert [fragment for fragment in fragments if fragment not in said] == [], said


def test_a_layer_looks_at_what_it_is_called_with():
    layer = Pattention(4, 8, 8)
    assert "[2, 7]" in refusal(lambda: layer(torch.ones(2, 7)))
    layer.activation = "nonsense"
    assert "'nonsense'" in refusal(lambda: layer(X))


def test_default_scale():
    assert "activation" in refusal(lambda: default_scale(4, "relu"))
    assert "num_tokens" in refusal(lambda: default_scale(0, "softmax"))


@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_x_of_any_floating_point_type_is_converted_to_that_of_the_tokens(given, tokens):
    generator = torch.Generator().manual_seed(0)
    layer = Pattention(12, 8, 5).to(tokens)
    x = torch.randn(3, 8, generator=generator).to(given).requires_grad_()
    out = layer(x)
    out.float().sum().backward()
    assert out.dtype == tokens and x.grad.dtype == given
    assert torch.equal(out, layer(x.detach().to(tokens)))


def test_no_rows_are_none_of_the_output():
    x = torch.ones(0, 8, requires_grad=True)
    layer = Pattention(12, 8, 5)
    layer(x).sum().backward()
    assert layer(x).shape == (0, 5) and not layer.key_tokens.grad.any()


@pytest.mark.parametrize("within", [False, True])
def test_autocast_computes_in_its_type(within):
    """The whole model, forward and backward; the backward may come outside of autocast or within."""
    model, ids = build_model(config()), torch.arange(8)[None]
    exact = torch.autograd.grad(model(ids).square().mean(), list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        out = pattention(X, KEYS, VALUES)
        loss = model(ids).float().square().mean()
        if within:
            loss.backward()
    if not within:
        loss.backward()
    assert out.dtype == torch.bfloat16
    for parameter, gradient in zip(model.parameters(), exact):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - gradient).norm() < 0.05 * gradient.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert pattention(X.double(), KEYS.double(), VALUES.double()).dtype == torch.float64


@pytest.mark.parametrize("with_gradient", [True, False])
def test_compiled_without_a_graph_break(with_gradient):
    generator = torch.Generator().manual_seed(0)
    x, keys, values = (torch.randn(n, 8, generator=generator).requires_grad_(with_gradient) for n in (3, 12, 12))
    torch._dynamo.reset()
    compiled = torch.compile(pattention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.double(), keys, values), pattention(x, keys, values))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x, keys, values), pattention(x, keys, values))
    # with a gradient-free model, as in an evaluation
    model, ids = build_model(config()).requires_grad_(with_gradient), torch.arange(8)[None]
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(ids), model(ids))
    with pytest.raises(RuntimeError, match="input_ids: an id is out of range, model.vocab_size is 50"):
        whole(torch.full((1, 8), 50))


SAMPLES = {
    "an id beyond the vocabulary": (torch.tensor([[1, 50]]), ["input_ids", "50 is out of range", "0 to 49"]),
    "an id below 0": (torch.tensor([[1, -100]]), ["-100 is out of range"]),
    "numbers": (torch.ones(1, 4), ["float32", "int64"]),
    "one sample": (torch.arange(4), ["[4]", "input_ids[None]"]),
    "no token": (torch.ones(1, 0, dtype=torch.int64), ["[1, 0]"]),
    "too long": (torch.ones(1, 9, dtype=torch.int64), ["9 tokens", "model.seq_length is 8", "seq_length=9"]),
    "a list": ([[1, 2]], ["a list", "torch.tensor(input_ids)"]),
    "another device": (torch.ones(1, 4, dtype=torch.int64, device="meta"), ["meta", "cpu"]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_refused_by_a_model(name):
    ids, fragments = SAMPLES[name]
    said = refusal(lambda: build_model(config())(ids))
    assert [fragment for fragment in fragments if fragment not in said] == [], said


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_ids_of_any_integer_type(dtype):
    model, ids = build_model(config()), torch.arange(8)[None]
    assert torch.equal(model(ids.to(dtype)), model(ids))


def test_starts_are_those_of_the_ids():
    model, ids = build_model(config()), torch.arange(8)[None]
    assert model(ids, document_starts(ids, [3])).shape == (1, 8, 50)
    assert "[1, 8] are expected" in refusal(lambda: model(ids, torch.zeros(8, dtype=torch.int32)))
    assert "float32" in refusal(lambda: model(ids, torch.zeros(1, 8)))
    assert "a list" in refusal(lambda: model(ids, [0]))


BUILDING = {
    "a mapping": (lambda: build_model({"num_layers": 2}), ["config", "a dict", "Model("]),
    "a seed below 0": (lambda: build_model(config(), seed=-1), ["seed", "-1"]),
    "half a seed": (lambda: build_model(config(), seed=1.5), ["seed", "1.5"]),
    "an integer type": (lambda: build_model(config(), dtype=torch.int8), ["dtype", "int8", "bfloat16"]),
    "the name of a type": (lambda: build_model(config(), dtype="bf16"), ["dtype", "'bf16'"]),
    "no such device": (lambda: build_model(config(), device="gpu"), ["device", "'gpu'", "'cuda:0'"]),
    "scales of another depth": (
        lambda: build_model(config(), scales=initial_scales(config(num_layers=1))),
        ["scales: has no τ of blocks.1.attention.query and 4 more"],
    ),
    "scales of a deeper model": (
        lambda: TokenFormer(config(), scales=initial_scales(config(num_layers=3))),
        ["scales: names what the model does not have: blocks.2.attention.query and 4 more"],
    ),
    "scales in a list": (lambda: TokenFormer(config(), scales=[1.0]), ["scales", "a list"]),
    "a scale": (
        lambda: TokenFormer(config(), scales={**initial_scales(config()), "blocks.0.ffn": 0.0}),
        ["scales['blocks.0.ffn']", "0.0"],
    ),
}


@pytest.mark.parametrize("name", BUILDING)
def test_refused_by_build_model(name):
    call, fragments = BUILDING[name]
    said = refusal(call)
    assert [fragment for fragment in fragments if fragment not in said] == [], said


def test_a_device_that_is_not_here(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA device is here" in refusal(lambda: build_model(config(), device="cuda:1"))


def test_a_configuration_that_no_network_has_stays_a_message_of_the_configuration():
    with pytest.raises(ConfigError, match="model.hidden_size: 16 is not a multiple of model.num_attention_heads 3"):
        build_model(config(num_attention_heads=3))


def test_no_check_waits_for_a_gpu():
    """Tensors that have no numbers say when one is asked for."""
    with FakeTensorMode():
        x, keys, ids = torch.ones(3, 8, device="cuda"), torch.ones(12, 8, device="cuda"), torch.ones(2, 8).long()
        check_pattention(x, keys, keys, 1.0, "softmax")
        assert "input_ids: is on cpu, the model on cuda" in refusal(
            lambda: checked_ids("input_ids", ids, config(), x.device)
        )
        ids = torch.zeros(2, 8, dtype=torch.int64, device="cuda")
        assert checked_ids("input_ids", ids, config(), x.device) is ids
        check_starts(ids, ids)
        with pytest.raises(DataDependentOutputException):
            ids.max().item()
