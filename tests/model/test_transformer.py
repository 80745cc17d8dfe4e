"""The Transformer against its formula in plain torch, written here without anything of the package."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from megatron_tf.config.sections.model import Model
from megatron_tf.model import build_model
from megatron_tf.state.parameters import parameter_table

LAYERS, WIDTH, HEADS, MLP, SEQUENCE, VOCABULARY = 3, 24, 3, 50, 10, 41


def model_config(**changes) -> Model:
    sizes = {"num_layers": LAYERS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "seq_length": SEQUENCE}
    return Model.model_validate(
        {"architecture": "transformer", **sizes, "vocab_size": VOCABULARY, "ffn_hidden_size": MLP, **changes}
    )


def rotated(x, fraction):
    """x [b, heads, s, head_dim]; pairs of channels as complex numbers, times e^(i·position·frequency)."""
    channels = int(x.shape[-1] * fraction)
    half = channels // 2
    pairs = torch.complex(x[..., :half].contiguous(), x[..., half:channels].contiguous())
    frequencies = 10000.0 ** (-torch.arange(half).to(x.dtype) * 2 / channels)
    angles = torch.arange(x.shape[2]).to(x.dtype)[:, None] * frequencies
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag, x[..., channels:]), -1)


def normalised(x, weight=1.0, bias=0.0):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def plain_logits(weights, ids, fraction, groups=HEADS):
    """`groups`: of HEADS/groups query heads that share a key and a value."""
    x = weights["embedding.weight"][ids]  # [b, s, d]
    batch, length, _ = x.shape
    future = torch.ones(length, length).triu(1).bool()
    for layer in range(LAYERS):
        w = {name: weights[f"blocks.{layer}.{name}.weight"] for name in ("attention.qkv", "attention.proj", "ffn.up",
                                                                         "ffn.down")}  # fmt: skip
        u = normalised(x)
        heads = []
        for *queries, key, value in w["attention.qkv"].view(groups, HEADS // groups + 2, WIDTH // HEADS, WIDTH):
            k, v = ((u @ matrix.T)[:, None] for matrix in (key, value))  # [b, 1, s, head_dim]
            for query in queries:
                q = (u @ query.T)[:, None]
                scores = rotated(q, fraction) @ rotated(k, fraction).mT / math.sqrt(WIDTH // HEADS)
                heads.append((scores.masked_fill(future, -math.inf).softmax(-1) @ v)[:, 0])
        x = x + torch.cat(heads, -1) @ w["attention.proj"]
        hidden = normalised(x) @ w["ffn.up"].T
        x = x + (hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2) @ w["ffn.down"]
    x = normalised(x, weights["final_norm.weight"], weights["final_norm.bias"])
    return x @ weights["embedding.weight"].T


@pytest.mark.parametrize(("fraction", "groups"), [(0.25, HEADS), (1.0, HEADS), (0.25, 1)])
def test_logits_and_every_gradient(fraction, groups):
    config = model_config(rotary_fraction=fraction, num_key_value_heads=groups)
    model = build_model(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # larger than initial weights, so that attention is far from uniform
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    copies = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    ids, labels = torch.randint(0, VOCABULARY, (2, 2, SEQUENCE), generator=generator)
    logits, expected = model(ids), plain_logits(copies, ids, fraction, groups)
    # the model's rotary tables are fp32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for each in (logits, expected):
        F.cross_entropy(each.flatten(0, 1), labels.flatten()).backward()
    for name, parameter in model.named_parameters():
        error = (parameter.grad - copies[name].grad).norm() / copies[name].grad.norm()
        assert error < 1e-5, f"{name}: {error:.2e}"


def test_parameters_are_those_of_the_table_and_no_bias():
    config = model_config()
    table = parameter_table(config)
    assert [(name, tuple(p.shape)) for name, p in build_model(config, device="meta").named_parameters()] == [
        (name, spec.shape) for name, spec in table.items()
    ]
    assert len(table) == 1 + 4 * LAYERS + 2
    for name, spec in table.items():
        norm = name.startswith("final_norm")
        assert (spec.sharded, spec.decayed, spec.growable) == (not norm, not norm, False)
        output = name.endswith(("proj.weight", "down.weight"))
        first = 0.02 if name.startswith("embedding") else 1 / math.sqrt(WIDTH)
        assert spec.std == (0.0 if norm else 2 / (LAYERS * math.sqrt(WIDTH)) if output else first)


def test_gradients_under_recomputation_are_the_same():
    ids = torch.arange(SEQUENCE)[None]
    gradients = []
    for recompute in (False, True):
        model = build_model(model_config())
        for block in model.blocks:
            block.recompute = recompute
        model(ids).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
