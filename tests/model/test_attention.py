"""Attention within documents against the formula, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from megatron_tf.config.sections.model import Model
from megatron_tf.model import attention, build_model
from megatron_tf.model.attention import (
    Documents,
    block_mask,
    causal_attention,
    dense_mask,
    document_starts,
    find_documents,
    full_attention,
)

SEQUENCE, BATCH, HEADS, HEAD_DIM, CHANNELS, BASE = 12, 2, 3, 8, 4, 100.0
STARTS = torch.tensor([[0] * 5 + [5] * 1 + [6] * 6, [0] * 12], dtype=torch.int32)


def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
    """x [head_dim]: channel pairs (j, j + CHANNELS/2) turned by position·BASE^(−2j/CHANNELS)."""
    half = CHANNELS // 2
    parts = list(x)
    for j in range(half):
        angle = position * BASE ** (-2 * j / CHANNELS)
        a, b = x[j], x[j + half]
        parts[j] = a * math.cos(angle) - b * math.sin(angle)
        parts[j + half] = b * math.cos(angle) + a * math.sin(angle)
    return torch.stack(parts)


def formula(query, key, value, starts, causal=True):
    """softmax over the tokens of a document up to the query, one query at a time; [s, b, heads·head_dim] each.

    Not `causal`: over all tokens of a sample.
    """
    out = torch.zeros_like(query)
    for b in range(BATCH):
        for h in range(HEADS):
            own = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
            for i in range(SEQUENCE):
                first = int(starts[b, i])
                q = rotated(query[i, b, own], i - first)
                stop = i + 1 if causal else SEQUENCE
                keys = torch.stack([rotated(key[j, b, own], j - first) for j in range(first, stop)])
                weights = (keys @ q / math.sqrt(HEAD_DIM)).softmax(0)
                out[i, b, own] = weights @ value[first:stop, b, own]
    return out


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shape = (SEQUENCE, BATCH, HEADS * HEAD_DIM)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for _ in range(4)]


def attend(query, key, value, documents=None, how=causal_attention):
    """All [s, b, heads·head_dim]."""
    heads = (tensor.unflatten(-1, (HEADS, HEAD_DIM)) for tensor in (query, key, value))
    return how(*heads, CHANNELS, BASE, documents)


def test_outputs_and_gradients():
    *tensors, grad = inputs()
    # the tables of angles are fp32 for every type: 1e-7 is their rounding
    documents = find_documents(STARTS, torch.float64, HEAD_DIM)
    actual = attend(*tensors, documents)
    expected = formula(*tensors, STARTS)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(out, tensors, grad) for out in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_full_attention_sees_all_positions():
    *tensors, grad = inputs()
    actual = attend(*tensors, how=full_attention)
    expected = formula(*tensors, torch.zeros(BATCH, SEQUENCE, dtype=torch.int32), causal=False)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(out, tensors, grad) for out in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_one_document_a_sample_is_what_no_documents_are():
    *tensors, _ = inputs()
    documents = find_documents(torch.zeros(BATCH, SEQUENCE, dtype=torch.int32), torch.float64, HEAD_DIM)
    within = attend(*tensors, documents)
    torch.testing.assert_close(within, attend(*tensors), rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_computes_the_same(monkeypatch):
    """What GPUs run, here without the compiler, which is torch's own part of it."""
    monkeypatch.setattr(attention, "_fused_flex_attention", lambda: flex_attention)
    tensors = [tensor.detach() for tensor in inputs(torch.float32)[:3]]
    dense, blocks = (
        attend(*tensors, Documents(STARTS, mask)) for mask in (dense_mask(STARTS, torch.float32), block_mask(STARTS))
    )
    torch.testing.assert_close(blocks, dense, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ids", "ends", "starts"),
    [
        ([5, 0, 6, 7, 0, 0, 8], (0,), [0, 0, 2, 2, 2, 5, 6]),
        ([5, 6, 7, 8, 9, 5, 0], (0,), [0] * 7),  # nothing comes after it
        ([0, 6, 1, 1, 9, 0, 1], (0, 1), [0, 1, 1, 3, 4, 4, 6]),  # 1 is padding
    ],
)
def test_a_document_begins_after_an_end(ids, ends, starts):
    found = document_starts(torch.tensor([ids, ids]), ends)
    assert found.dtype == torch.int32 and found.tolist() == [starts, starts]


def model(**changes):
    sizes = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 24, "vocab_size": 50}
    tokens = {"qkv": 13, "proj": 11, "ffn": 30}
    config = Model.model_validate({**sizes, "rotary_fraction": 0.5, "parameter_tokens": tokens, **changes})
    return build_model(config, dtype=torch.float64)


@torch.no_grad()
def test_documents_packed_into_a_sample_have_the_logits_of_each_alone():
    one = model()
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(1, 50, (1, n), generator=generator) for n in (9, 14))
    eod = torch.zeros(1, 1, dtype=torch.int64)
    packed = torch.cat((first, eod, second), 1)
    logits = one(packed, document_starts(packed, (0,)))
    alone = torch.cat((one(torch.cat((first, eod), 1)), one(second)), 1)
    # fp64: what is left is the order of summation
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-13)
    assert (one(packed) - alone)[:, 10:].abs().max() > 1e-3, "without boundaries the second sees the first"


def test_the_compiler_has_nothing_to_warn_of(recwarn):
    query, key, value = (torch.randn(8, 2, 4, 16) for _ in range(3))
    compiled = torch.compile(causal_attention, backend="eager", fullgraph=True)
    expected = causal_attention(query, key, value, 16, 10000.0)
    torch.testing.assert_close(compiled(query, key, value, 16, 10000.0), expected)
    assert [str(warning.message) for warning in recwarn if "lru_cache" in str(warning.message)] == []


def test_training_after_an_evaluation_in_inference_mode():
    """Tables that were made there cannot be saved for a backward pass."""
    query, key, value = torch.randn(3, 23, 1, 2, 8).unbind()
    with torch.inference_mode():
        expected = causal_attention(query, key, value, 4, 777.0)
    query.requires_grad_()
    found = causal_attention(query, key, value, 4, 777.0)
    found.sum().backward()
    assert query.grad is not None and torch.equal(found.detach(), expected)
