from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tf.config import load_config
from megatron_tf.config.run_plan import topology_for
from megatron_tf.config.topology import Topology
from megatron_tf.costs import estimate
from megatron_tf.costs.plan import describe
from megatron_tf.state.parameters import parameter_table, shard_range
from megatron_tf.telemetry.text import size

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name, *overrides):
    return load_config(CONFIGS / f"{name}.yml", overrides)


def test_one_rank_holds_every_parameter():
    model = load("124M").model
    assert estimate.parameters_per_rank(model, Topology()) == estimate.num_parameters(model) == 123_569_664


def test_block_parameters_are_what_growth_adds():
    small, large = load("124M").model, load("354M").model
    added = estimate.num_used_block_parameters(large) - estimate.num_used_block_parameters(small)
    assert added == estimate.num_parameters(large) - estimate.num_parameters(small)


def test_pipeline_stages_hold_the_model_and_one_more_embedding():
    model = load("354M").model
    topology = Topology(pipeline=5)
    stages = [estimate.stage_parameters(model, topology, stage) for stage in range(5)]
    embedding = model.vocab_size * model.hidden_size
    assert sum(stages) == estimate.num_parameters(model) + embedding
    block = estimate.num_used_block_parameters(model) // model.num_layers
    assert stages == [3 * block + embedding, 2 * block, 3 * block, 2 * block, 2 * block + embedding + 2 * 768]


def test_tensor_ranks_hold_shards_and_whole_norms():
    model = load("757M").model  # 4850 tokens do not divide by 4
    topology = Topology(tensor=4)
    shards = [
        sum(
            (lambda start, stop: (stop - start) * spec.width)(*shard_range(spec.shape[0], 4, rank))
            if spec.sharded
            else spec.numel
            for spec in parameter_table(model).values()
        )
        for rank in range(4)
    ]
    assert sum(shards) == estimate.num_parameters(model) + 3 * 2 * 768
    assert estimate.parameters_per_rank(model, topology) == max(shards)


def test_flops_per_token_by_hand():
    model = load("tiny").model
    tokens = 4 * 2 * (4 * 128 + 512) * 128  # layers × (keys, values) × n × d
    head = 4096 * 128
    attention = 4 * 2 * 256 * 128  # layers × two products × s × d
    assert estimate.flops_per_token(model) == 3 * 2 * (tokens + head + attention)


@pytest.mark.parametrize(
    ("precision", "zero_stage", "per_parameter"),
    [("bf16", 1, (2, 6, 3)), ("fp16", 1, (2, 3, 3)), ("fp32", 1, (4, 5, 3)), ("fp32", 0, (4, 4, 8))],
)
def test_state_bytes_at_four_data_parallel_ranks(precision, zero_stage, per_parameter):
    assert estimate.parameter_state_bytes(1000, precision, zero_stage, 4) == tuple(
        1000 * size for size in per_parameter
    )


def test_memory_of_bf16_is_eight_and_a_share_of_twelve_bytes():
    memory = estimate.memory_per_rank(load("124M"), 8)
    parameters = 123_569_664
    assert memory.weights + memory.gradients == 8 * parameters
    assert memory.optimizer == 12 * parameters // 8
    assert memory.total == memory.weights + memory.gradients + memory.optimizer + memory.activations


def test_block_activations_by_hand():
    # s·b = 256·4 positions in fp32: 2d norm inputs, 2d inputs, 4·128 + 512 scores, 4d attention, 13 statistics
    per_position = 4 * (2 * 128 + 2 * 128 + 1024 + 4 * 128) + 4 * (5 + 4 + 4)
    assert estimate.block_activation_bytes(load("tiny")) == 256 * 4 * per_position
    # halves of the tokens and heads, and the gathered input of proj as a tensor of its own
    per_position = 4 * (2 * 128 + 3 * 128 + 512 + 2 * 128) + 4 * (5 + 4 + 2)
    assert estimate.block_activation_bytes(load("tiny", "parallel.tensor=2")) == 256 * 4 * per_position


def test_sharding_and_checkpointing_save_activations():
    def activations(*overrides):
        config = load("tiny", *overrides)
        ranks = config.parallel.tensor * config.parallel.pipeline
        return estimate.memory_per_rank(config, ranks).activations

    whole = activations()
    tensor, sequence = activations("parallel.tensor=2"), activations("parallel={tensor: 2, sequence: true}")
    assert sequence < tensor < whole
    assert activations("training.activation_checkpointing=true") < whole
    assert activations("training.micro_batch_size=2") * 2 == whole


def test_first_stage_keeps_a_micro_batch_for_each_stage_behind_it():
    config = load("tiny", "parallel.pipeline=4", "training.micro_batch_size=1", "model.vocab_size=16")
    memory = estimate.memory_per_rank(config, 4)
    kept = 4 * estimate.block_activation_bytes(config)
    assert memory.activations == kept + estimate.block_backward_bytes(config)
    assert estimate.block_backward_bytes(config) == 256 * 4 * (3 * 512 + 2 * 128)


def test_optimizer_share_shrinks_with_data_parallel_ranks():
    config = load("124M")
    assert estimate.memory_per_rank(config, 16).optimizer * 2 == estimate.memory_per_rank(config, 8).optimizer


def test_describe_shows_model_layout_batch_length_and_memory():
    config = load("1.4B")
    text = describe(config, 16)
    assert str(topology_for(config, 16)) == "TP2×PP1×DP8"
    for fact in (
        "1,309,705,728 parameters",
        "grown from runs/757M by gram",
        "16 ranks as TP2×PP1×DP8, sequence-parallel, ZeRO 1, bf16",
        "512 samples = 8 a micro batch × 8 accumulated × 8 data-parallel; × 1,024 = 524,288 tokens",
        "114,441 steps",
        "60,000,000,000 tokens",
        "a rank: weights",
    ):
        assert fact in text
    assert [line.split()[0] for line in text.splitlines()] == [
        "run",
        "model",
        "layout",
        "step",
        "length",
        "memory",
        "scores",
    ]


def test_describe_says_that_the_torch_engine_takes_no_zero():
    assert "TP1×PP1×DP2, torch, sharded optimizer, fp32" in describe(load("tiny", "parallel.engine=torch"), 2)
    given = load("tiny", "parallel.engine=torch", "zero.stage=1")
    assert "torch, sharded optimizer; zero.stage has no effect, fp32" in describe(given, 2)


def test_describe_says_where_norms_come_from_and_what_the_scores_take():
    config, recomputed = load("1.4B"), load("1.4B", "training.scores=recompute")
    there = size(estimate.memory_per_rank(recomputed, 16).activations)
    assert describe(config, 16).splitlines()[-1] == (
        f"scores  norms of qkv, proj, ffn from KᵀK; training.scores keep, with recompute activations would be {there}"
    )
    fewer = load("1.4B", "model.parameter_tokens.proj=768")
    assert "scores  norms of proj from the scores; norms of qkv, ffn from KᵀK;" in describe(fewer, 16)
    assert "scores  norms of qkv, proj, ffn from the scores;" in describe(config, 16, device="cpu")
    assert "scores" not in describe(load("transformer_124M"), 16)
    sparse = describe(load("sparse_124M_to_762M"), 16).splitlines()[-1]  # it refuses training.scores=recompute
    assert sparse == "scores  norms of qkv, proj, ffn from the scores; training.scores keep"


def test_the_plan_says_when_fp8_is_slower_than_bf16():
    slower = "slower than bf16 unless training.compile is true"
    fp8 = "training.precision=fp8", "parallel.engine=torch"
    assert slower in describe(load("354M", *fp8), 16)
    assert slower not in describe(load("354M", *fp8, "training.compile=true"), 16)
    assert slower not in describe(load("354M", *fp8), 16, device="cpu")


def test_without_scores_a_layer_keeps_what_does_not_depend_on_its_tokens():
    kept, recomputed = (
        estimate.block_activation_bytes(
            load("1.4B", f"training.scores={scores}", "parallel={tensor: 1, sequence: false}")
        )
        for scores in ("keep", "recompute")
    )
    positions = 8 * 1024
    assert kept - recomputed == positions * 2 * (4 * 8620 + 34480)
    assert recomputed / positions == 2 * 8 * 768 + 4 * (9 + 12)
