"""The growth cases of the official code, and the ones that keep the function (tests/golden/incremental)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_tf.config.sections.model import Model
from megatron_tf.convert.official import load_official_state_dict
from megatron_tf.model import build_model
from megatron_tf.state.parameters import initial_scales, parameter_table

OLD, NEW = {"qkv": 48, "proj": 48, "ffn": 160}, {"qkv": 112, "proj": 112, "ffn": 368}


@pytest.fixture(scope="module")
def golden():
    return load_file(Path(__file__).parents[1] / "golden" / "incremental.safetensors")


def config(tokens, golden) -> Model:
    vocab, width = golden["src/sequential.0.word_embeddings.weight"].shape
    layers = sum(name.startswith("src/") for name in golden) // 10
    return Model.model_validate(
        {"num_layers": layers, "hidden_size": width, "num_attention_heads": 4, "seq_length": 32,
         "vocab_size": vocab, "parameter_tokens": tokens}
    )  # fmt: skip


def logits(golden, model_config, weights, scales=None):
    model = build_model(model_config, dtype=torch.float64, scales=scales)
    load_official_state_dict(weights, model)
    return model(golden["input_ids"]).detach()


def grown(golden):
    return {k[len("grown/") :]: v.double() for k, v in golden.items() if k.startswith("grown/")}


def with_new_keys(golden, keys, values=None):
    """The grown weights with other new key tokens (and value tokens)."""
    weights = grown(golden)
    for spec in parameter_table(config(OLD, golden)).values():
        name = spec.official_name
        if name.endswith(".key_param_tokens"):
            weights[name][spec.shape[0] :] = keys(name)
        if values is not None and name.endswith(".value_param_tokens"):
            weights[name][spec.shape[0] :] = values
    return weights


def close(actual, expected, tolerance=1e-10):
    assert (actual - expected).abs().max().item() <= tolerance


def test_source(golden):
    weights = {k[4:]: v for k, v in golden.items() if k.startswith("src/")}
    close(logits(golden, config(OLD, golden), weights), golden["logits_src_fp64"])


def test_random_new_tokens_as_the_official_code(golden):
    close(logits(golden, config(NEW, golden), grown(golden)), golden["logits_random_new_fp64"])


def test_zero_keys_without_held_scale_change_the_function(golden):
    actual = logits(golden, config(NEW, golden), with_new_keys(golden, lambda name: 0))
    close(actual, golden["logits_zero_new_keys_tau_sqrt_n_new_fp64"])
    assert (actual - golden["logits_src_fp64"]).abs().max() > 1


def test_zero_keys_with_held_scale_keep_the_function(golden):
    scales = initial_scales(config(OLD, golden))
    actual = logits(golden, config(NEW, golden), with_new_keys(golden, lambda name: 0), scales)
    close(actual, golden["logits_zero_new_keys_tau_held_sqrt_n_old_fp64"])
    close(actual, golden["logits_src_fp64"], 1e-12)


def test_gram_matched_keys_keep_the_function_with_the_new_scale(golden):
    assert initial_scales(config(NEW, golden))["blocks.0.ffn"] == math.sqrt(368)
    weights = with_new_keys(golden, lambda name: golden[f"gram_new_keys_fp32/{name}"].double(), values=0)
    # the new keys are stored in fp32, which limits the agreement
    close(logits(golden, config(NEW, golden), weights), golden["logits_src_fp64"], 1e-4)
