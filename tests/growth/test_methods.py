from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from megatron_tf.config.sections.growth import Growth, GrowthMethods, TokenMethod
from megatron_tf.config.sections.model import ParameterTokens
from megatron_tf.errors import ArgumentError, CheckpointError, ConfigError
from megatron_tf.growth.methods import METHODS, PRESERVING, GrowingProjection, NewTokens, gram, zero_key

D, OLD, NEW = 16, 24, 41


def pattention(x: Tensor, keys: Tensor, values: Tensor, scale: float, activation: str) -> Tensor:
    """The formula, in the plainest way, fp64."""
    scores = x @ keys.T
    if activation == "l2_norm_gelu":
        return gelu(scale * scores / scores.norm(dim=-1, keepdim=True)) @ values
    weights = gelu(scores)
    return scale * weights / weights.norm(dim=-1, keepdim=True) @ values


def projection(
    activation: str, scale: float = 3.0, old_keys: Tensor | None = None, old=OLD, new=NEW
) -> GrowingProjection:
    initial = torch.randn(new * D, generator=torch.Generator().manual_seed(9))

    def elements(start: int, stop: int) -> Tensor:
        return initial[start:stop]

    def keys(start: int, stop: int) -> Tensor:
        assert old_keys is not None, "a method reads no state before its elements are asked for"
        return old_keys.reshape(-1)[start:stop]

    key = {"key_tokens": elements}
    return GrowingProjection(
        "blocks.0.ffn", "ffn", "growth.method", activation, D, old, new, scale, 5, {"key_tokens": keys}, key,
        {"value_tokens": elements},
    )  # fmt: skip


def grown(
    activation: str, keys: Tensor, values: Tensor, scale: float, method: str = "zero_key"
) -> tuple[Tensor, Tensor, float]:
    tokens = METHODS[method](projection(activation, scale, keys))

    def rows(tensor: str) -> Tensor:
        elements = tokens.elements(tensor)
        return torch.zeros(NEW - OLD, D) if elements is None else elements(OLD * D, NEW * D).view(-1, D)

    new_keys, new_values = rows("key_tokens").double(), rows("value_tokens").double()
    return (
        torch.cat([keys, new_keys]),
        torch.cat([values * tokens.old_values_factor, new_values]),
        tokens.scale,
    )


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (10, OLD, OLD)]


@pytest.mark.parametrize("method", ["zero_key", "gram"])
@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("scale", [math.sqrt(OLD), 3.0])
def test_a_preserving_method_keeps_the_function(tensors, activation, scale, method):
    x, keys, values = tensors
    before = pattention(x, keys, values, scale, activation)
    *tokens, new_scale = grown(activation, keys, values, scale, method)
    after = pattention(x, *tokens, new_scale, activation)
    assert (after - before).abs().max() <= 1e-13 * before.abs().max()
    assert new_scale == (scale if method == "zero_key" else math.sqrt(NEW))


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_random_does_not(tensors, activation):
    x, keys, values = tensors
    before = pattention(x, keys, values, math.sqrt(OLD), activation)
    *tokens, scale = grown(activation, keys, values, math.sqrt(OLD), "random")
    assert (pattention(x, *tokens, scale, activation) - before).abs().max() > 0.1 * before.abs().max()
    assert scale == math.sqrt(NEW) and "random" not in PRESERVING


@pytest.mark.parametrize("held", [1.0, 0.6])
@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_matched_keeps_the_variance_of_outputs(activation, held):
    """`held`: τ before over the default, below 1 after a growth by zero_key. Large enough that chance is small."""
    width, old, new = 256, 300, 1200
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, keys, values, normal = draw(200, width), 0.05 * draw(old, width), 0.3 * draw(old, width), draw(2, new, width)
    scale = held * (old if activation == "softmax" else old**0.5)
    tokens = METHODS["matched"](drawn_projection(activation, scale, keys, values, normal))
    assert tokens.old_values_factor == 0.5
    assert tokens.scale == pytest.approx(scale * (4 if activation == "softmax" else 2))
    new_keys, new_values = (
        tokens.elements(name)(old * width, new * width).view(-1, width) for name in ("key_tokens", "value_tokens")
    )
    assert new_keys.std().item() == pytest.approx(0.05, rel=0.01)
    assert new_values.std().item() == pytest.approx(0.15, rel=0.01)
    part = tokens.elements("key_tokens")(old * width + 7, old * width + 99)
    assert torch.equal(part, new_keys.flatten()[7:99])

    before, after = (
        weights_of(x, tensor, factor, activation)
        for tensor, factor in ((keys, scale), (torch.cat([keys, new_keys]), tokens.scale))
    )
    all_values = torch.cat([values / 2, new_values])
    # over draws of the values, and of the ones that were drawn
    expected = after.square().sum(1).mean() * all_values.square().mean()
    assert (expected / (before.square().sum(1).mean() * values.square().mean())).item() == pytest.approx(1, rel=0.04)
    outputs = before @ values
    grown_outputs = after @ all_values
    assert (grown_outputs.square().mean() / outputs.square().mean()).item() == pytest.approx(1, rel=0.2)
    # old tokens keep their weights; half of the old output is left
    assert ((after[:, :old] * before).sum() / before.square().sum()).item() == pytest.approx(1, rel=0.03)
    assert ((grown_outputs * outputs).mean() / outputs.square().mean()).item() == pytest.approx(0.5, abs=0.1)
    assert "matched" not in PRESERVING


def drawn_projection(activation: str, scale: float, keys: Tensor, values: Tensor, normal: Tensor) -> GrowingProjection:
    """`normal` [2, n_new, d]: of keys and of values."""

    def read(tensor: Tensor):
        return lambda start, stop: tensor.reshape(-1)[start:stop]

    of_keys, of_values = {"key_tokens": read(keys)}, {"value_tokens": read(values)}
    drawn = {"key_tokens": read(normal[0]), "value_tokens": read(normal[1])}
    return GrowingProjection(
        "blocks.0.ffn", "ffn", "growth.method", activation, keys.shape[1], len(keys), normal.shape[1], scale, 5,
        of_keys, of_keys, of_values, of_values, drawn,
    )  # fmt: skip


def weights_of(x: Tensor, keys: Tensor, scale: float, activation: str) -> Tensor:
    """Weights of the tokens; the activations of `pattention`, and softmax."""
    if activation == "softmax":
        return scale * (x @ keys.T).softmax(-1)
    return pattention(x, keys, torch.eye(len(keys), dtype=x.dtype), scale, activation)


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_it_is_the_held_scale_that_keeps_it(tensors, activation):
    """The same tokens under τ = √n_new change the output: this test can tell."""
    x, keys, values = tensors
    before = pattention(x, keys, values, math.sqrt(OLD), activation)
    grown_keys, grown_values, _ = grown(activation, keys, values, math.sqrt(OLD))
    after = pattention(x, grown_keys, grown_values, math.sqrt(NEW), activation)
    assert (after - before).abs().max() > 0.1 * before.abs().max()


def test_rescaling_old_values_is_the_other_half_of_moving_the_scale(tensors):
    """gelu_l2_norm: old values times √(n_old/n_new) is exact with τ = √n_new, and wrong with τ held."""
    x, keys, values = tensors
    before = pattention(x, keys, values, math.sqrt(OLD), "gelu_l2_norm")
    grown_keys, grown_values, held = grown("gelu_l2_norm", keys, values, math.sqrt(OLD))
    rescaled = torch.cat([values * math.sqrt(OLD / NEW), grown_values[OLD:]])
    moved = pattention(x, grown_keys, rescaled, math.sqrt(NEW), "gelu_l2_norm")
    assert (moved - before).abs().max() <= 1e-13 * before.abs().max()
    twice = pattention(x, grown_keys, rescaled, held, "gelu_l2_norm")
    torch.testing.assert_close(twice, before * math.sqrt(OLD / NEW))


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
def test_every_new_token_gets_a_gradient_through_its_key(tensors, activation):
    x, keys, values = tensors
    grown_keys, grown_values, scale = grown(activation, keys, values, 3.0)
    grown_keys.requires_grad_()
    pattention(x, grown_keys, grown_values, scale, activation).square().sum().backward()
    assert (grown_keys.grad[OLD:].norm(dim=1) > 0).all()


def test_softmax_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"softmax model: a zero key has the weight exp\(0\) = 1, not 0"):
        zero_key(projection("softmax"))
    with pytest.raises(ConfigError, match=r"softmax model: a new token takes the share exp\(A\) > 0"):
        gram(projection("softmax"))
    assert METHODS["random"](projection("softmax")).scale == NEW


def test_dead_tokens_are_refused():
    with pytest.raises(ConfigError, match="key 0 and value 0 are refused: both their gradients are 0"):
        NewTokens(1.0, keys=None, values=None)
    dead = gram(projection("l2_norm_gelu", 3.0, torch.zeros(OLD, D)))
    with pytest.raises(CheckpointError, match="blocks.0.ffn.key_tokens: all old keys are 0"):
        dead.elements("key_tokens")(OLD * D, NEW * D)


@pytest.mark.parametrize(("old", "new", "needed"), [(24, 39, 16), (10, 19, 10)])
def test_gram_with_too_few_new_tokens_is_refused_with_the_numbers(old, new, needed):
    with pytest.raises(ConfigError) as caught:
        gram(projection("l2_norm_gelu", old=old, new=new))
    for text in (
        f"needs at least {needed} new ffn tokens",
        f"from {old} to {new} they are {new - old}",
        f"model.parameter_tokens.ffn to at least {old + needed}",
    ):
        assert text in str(caught.value)
    gram(projection("l2_norm_gelu", old=old, new=old + needed))
    gram(projection("gelu_l2_norm", old=old, new=old + 1))


def test_gram_cannot_lower_the_scale():
    with pytest.raises(ConfigError, match="√41 = 6.40312, which must be more than the 6.5 of now"):
        gram(projection("l2_norm_gelu", scale=6.5))


def test_methods_are_those_of_the_configuration():
    assert set(METHODS) == set(get_args(TokenMethod))
    assert set(METHODS) > PRESERVING


def test_every_kind_of_projection_can_have_its_method():
    assert set(GrowthMethods.model_fields) == set(ParameterTokens.model_fields)
    growth = Growth(source="x", method="gram", methods=GrowthMethods(ffn="random"))
    assert [growth.method_of(kind) for kind in ("qkv", "proj", "ffn")] == ["gram", "gram", "random"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("relu",), "activation: the text 'relu', but one of l2_norm_gelu"),
        (("softmax", -1.0), "scale: the number -1.0"),
        (("softmax", 3.0, None, 24, 24), "new_tokens: the number 24 is out of range. .* at least 25"),
        (("softmax", 3.0, None, 0, 24), "old_tokens: the number 0"),
    ],
)
def test_a_projection_that_cannot_grow(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        projection(*arguments)
