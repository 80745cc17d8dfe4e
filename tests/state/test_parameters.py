from __future__ import annotations

import itertools
import math

import pytest

from megatron_tf.config.sections.model import Model, ParameterTokens
from megatron_tf.state.parameters import (
    default_scale,
    initial_scales,
    parameter_table,
    projections,
    shard_range,
)
from megatron_tf.tasks.language_model.task import EMBEDDING

MODEL = Model(
    num_layers=2,
    hidden_size=8,
    num_attention_heads=2,
    seq_length=4,
    vocab_size=11,
    parameter_tokens=ParameterTokens(qkv=3, proj=5, ffn=7),
)


def test_names_shapes_and_order():
    table = parameter_table(MODEL)
    block = [(f"attention.{name}", 3) for name in ("query", "key", "value")] + [("attention.proj", 5), ("ffn", 7)]
    expected = {EMBEDDING: (11, 8)}
    for layer in range(2):
        for name, tokens in block:
            for kind in ("key", "value"):
                expected[f"blocks.{layer}.{name}.{kind}_tokens"] = (tokens, 8)
    expected |= {"final_norm.weight": (8,), "final_norm.bias": (8,)}
    assert [(name, spec.shape) for name, spec in table.items()] == list(expected.items())
    assert all(name == spec.name for name, spec in table.items())


def test_facts_of_each_kind_of_parameter():
    for name, spec in parameter_table(MODEL).items():
        token, norm = name.endswith("_tokens"), name.startswith("final_norm")
        assert spec.growable is token
        assert spec.sharded is not norm
        assert spec.decayed is not norm
        assert spec.mean == (1.0 if name == "final_norm.weight" else 0.0)
        value_std = 2 / (2 * math.sqrt(8))
        assert spec.std == (0.0 if norm else value_std if name.endswith("value_tokens") else 0.02)
        assert spec.numel == math.prod(spec.shape)
        assert spec.width == (1 if norm else 8)
        assert spec.ends == (("last",) if norm else ("first", "last") if name == EMBEDDING else ())
        assert spec.tied is (name == EMBEDDING)


def test_official_names_are_distinct_and_count_from_the_embedding():
    table = parameter_table(MODEL)
    assert len({spec.official_name for spec in table.values()}) == len(table)
    assert table["blocks.1.ffn.key_tokens"].official_name == "sequential.3.mlp.key_param_tokens"
    assert (
        table["blocks.0.attention.proj.value_tokens"].official_name == "sequential.2.attention.proj.value_param_tokens"
    )
    assert table["final_norm.bias"].official_name == "sequential.5.norm.bias"


def test_huggingface_names_are_distinct_and_values_are_transposed():
    table = parameter_table(MODEL)
    assert len({spec.huggingface_name for spec in table.values()}) == len(table)
    assert table[EMBEDDING].huggingface_name == "model.embed_tokens.weight"
    assert table["blocks.1.attention.proj.key_tokens"].huggingface_name == "model.layers.1.self_attn.o_proj.keys.weight"
    assert table["blocks.0.ffn.value_tokens"].huggingface_name == "model.layers.0.mlp.values.weight"
    assert {name.split(".")[-1] for name, spec in table.items() if spec.transposed} == {"value_tokens"}


def test_scales():
    assert default_scale(9, "l2_norm_gelu") == default_scale(9, "gelu_l2_norm") == 3.0
    assert default_scale(9, "softmax") == 9.0
    assert projections(MODEL)["blocks.1.attention.proj"].tokens == 5
    assert initial_scales(MODEL)["blocks.0.ffn"] == math.sqrt(7)
    assert len(initial_scales(MODEL)) == 10


@pytest.mark.parametrize("rows", [1, 5, 8, 2140, 4850])
@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
def test_shards_cover_the_rows_evenly_and_without_padding(rows, num_shards):
    ranges = [shard_range(rows, num_shards, shard) for shard in range(num_shards)]
    assert ranges[0][0] == 0 and ranges[-1][1] == rows
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1
