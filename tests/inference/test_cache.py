"""What the cache saves must not show: logits to rounding, and text token for token."""

from __future__ import annotations

import pytest
import torch

from megatron_tf.config.sections.model import Model
from megatron_tf.errors import ArgumentError
from megatron_tf.inference import cache
from megatron_tf.inference.cache import CachedModel
from megatron_tf.inference.sampling import generate
from megatron_tf.model.attention import causal_attention
from megatron_tf.model.tokenformer import build_model

CONTEXT = 24
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [7], [11, 12, 13, 14]]


@pytest.fixture(params=["l2_norm_gelu", "gelu_l2_norm", "softmax", "no rotary"])
def model(request):
    """In fp64, so that rounding decides nothing, and with weights that make every part of it count."""
    kind = {"rotary_fraction": 0.0} if request.param == "no rotary" else {"activation": request.param}
    config = {"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "seq_length": CONTEXT, "vocab_size": 31,
              "parameter_tokens": {"qkv": 9, "proj": 7, "ffn": 20}}  # fmt: skip
    model = build_model(Model.model_validate({**config, **kind}), dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.state_dict().items():
        if not name.startswith("final_norm"):
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn - drawn.mean(0))  # else the direction that all outputs share picks the same token always
    return model


def uncached(model):
    """Each row by itself, all of it at every call."""

    def logits(ids, padding):
        with torch.no_grad():
            return torch.cat([model(row[None, pad:])[:, -1] for row, pad in zip(ids, padding.tolist())])

    return logits


def padded(prompts):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([longest - len(prompt) for prompt in prompts])


# The tables of the rotary embedding are fp32, and padding moves a row to other positions of them.
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def test_logits_of_several_steps(model):
    cached, plain = CachedModel(model), uncached(model)
    ids, padding = padded(PROMPTS)
    new = torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(1))
    for stop in (0, 1, 2, 5, 9):  # one id at a time, and several
        step = torch.cat((ids, new[:, :stop]), 1)
        torch.testing.assert_close(cached(step, padding), plain(step, padding), **CLOSE)
    other = step.clone()
    other[1, 12] += 1  # of the past: nothing that is kept may be used
    for ids in (other, other[:, 3:], other[:2], step):
        rows = padding[: len(ids)].clamp(max=ids.shape[1] - 1)
        torch.testing.assert_close(cached(ids, rows), plain(ids, rows), **CLOSE)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one prompt", "of different lengths"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_token_for_token_and_beyond_the_context(model, prompts, temperature):
    options = {"num_tokens": 40, "context": CONTEXT, "temperature": temperature, "seed": 5}
    found = list(generate(CachedModel(model), prompts, **options))
    assert found == list(generate(uncached(model), prompts, **options))
    assert len(found) == 40 and len({token for step in found for token in step}) > 1


def test_only_new_ids_are_computed_and_the_model_stays_as_it_was(model, monkeypatch):
    monkeypatch.setattr(cache, "_CAPACITY_STEP", 2)  # so that room runs out between steps
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape[0]))
    steps = list(generate(CachedModel(model), [[1, 2, 3]], num_tokens=8, context=CONTEXT))
    assert len(steps) == 8 and seen == [3] + [1] * 7
    assert all(block.attention.attend is causal_attention for block in model.blocks)
    assert steps == list(generate(uncached(model), [[1, 2, 3]], num_tokens=8, context=CONTEXT))


@pytest.mark.parametrize(
    ("ids", "padding", "message"),
    [
        ([[1, 31]], [0], "ids: 31 is out of range, model.vocab_size is 31"),
        ([[1, -1]], [0], "ids: -1 is out of range"),
        ([1, 2], [0], r"ids: the shape is \[2\]"),
        ([[1.0, 2.0]], [0], "ids: the type is float32"),
        ([[1, 2]], [0, 0], r"padding: the shape is \[2\].*\[1\] are expected"),
        ([[1, 2]], [0.0], "padding: .*float32"),
    ],
)
def test_ids_that_are_none_are_refused(model, ids, padding, message):
    with pytest.raises(ArgumentError, match=message):
        CachedModel(model)(torch.tensor(ids), torch.tensor(padding))


def test_only_a_tokenformer_is_taken():
    with pytest.raises(ArgumentError, match="model: a Linear, but a TokenFormer is expected"):
        CachedModel(torch.nn.Linear(1, 1))
