from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from megatron_tf.errors import ConfigError
from megatron_tf.growth.methods import METHODS, Projection, zero_key

D, OLD, NEW = 16, 24, 41


def pattention(x: Tensor, keys: Tensor, values: Tensor, scale: float, activation: str) -> Tensor:
    """The formula, in the plainest way, fp64."""
    scores = x @ keys.T
    if activation == "l2_norm_gelu":
        return gelu(scale * scores / scores.norm(dim=-1, keepdim=True)) @ values
    weights = gelu(scores)
    return scale * weights / weights.norm(dim=-1, keepdim=True) @ values


def projection(activation: str, scale: float = 3.0) -> Projection:
    initial = torch.randn(NEW * D, generator=torch.Generator().manual_seed(9))
    return Projection(
        "blocks.0.ffn",
        activation,
        scale,
        lambda start, stop: initial[start:stop],
        lambda start, stop: initial[start:stop],
    )


def grown(activation: str, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    tokens = zero_key(projection(activation, scale))
    new_keys, new_values = (rows(OLD * D, NEW * D).view(-1, D).double() for rows in (tokens.keys, tokens.values))
    return torch.cat([keys, new_keys]), torch.cat([values, new_values]), tokens.scale


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (10, OLD, OLD)]


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("scale", [math.sqrt(OLD), 3.0])
def test_zero_key_keeps_the_function(tensors, activation, scale):
    x, keys, values = tensors
    before = pattention(x, keys, values, scale, activation)
    after = pattention(x, *grown(activation, keys, values, scale), activation)
    assert (after - before).abs().max() <= 1e-13 * before.abs().max()


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


def test_methods_are_those_of_the_configuration():
    from typing import get_args

    from megatron_tf.config.schema import Growth

    assert set(METHODS) == set(get_args(Growth.model_fields["method"].annotation))
