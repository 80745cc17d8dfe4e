"""The section `model.sparse`: its values, its costs, and what refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sparse_models import TOKENS, with_bank, with_banks, without_banks
from tiny import run_config

from megatron_tf.checkpoint.architecture import check_format, check_prunable
from megatron_tf.config import load_config
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.load import dump_config
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.validate import validate
from megatron_tf.costs.communication import sent_bytes_per_step
from megatron_tf.costs.estimate import flops_per_token, num_parameters
from megatron_tf.costs.hardware import GPUS, Assumptions
from megatron_tf.costs.plan import describe
from megatron_tf.costs.work import block_seconds
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.growth.rules import growth_problems, scales_after_growth
from megatron_tf.model import build_model
from megatron_tf.state.parameters import initial_scales, parameter_table


def test_the_section_is_read_and_written(tmp_path: Path):
    file = tmp_path / "run.yml"
    file.write_text(dump_config(with_bank()))
    assert load_config(file) == with_bank()
    with pytest.raises(ConfigError, match="model.sparse.ffn.group_size: .*multiple of 16"):
        load_config(file, ["model.sparse.ffn.group_size=24"])
    with pytest.raises(ConfigError, match="model.sparse.ffn.candidates: .*at least 1"):
        load_config(file, ["model.sparse.ffn.candidates=0"])
    with pytest.raises(ConfigError, match="model.sparse.mlp: unknown key. The keys of model.sparse are"):
        load_config(file, ["model.sparse.mlp=null"])
    with pytest.raises(ConfigError, match="model.sparse.ffn.group_size: missing"):
        load_config(file, ["model.sparse.ffn={candidates: 4}"])
    file.write_text(dump_config(with_banks()))
    assert load_config(file) == with_banks()


def test_with_one_candidate_a_projection_is_dense(tmp_path: Path):
    file = tmp_path / "run.yml"
    file.write_text(dump_config(with_bank()))
    assert load_config(file, ["model.sparse.ffn.candidates=1"]) == without_banks()
    file.write_text(dump_config(with_banks()))
    model = load_config(file, ["model.sparse.ffn.candidates=1"]).model
    assert architecture_of(model).sparse_sections(model).keys() == {"qkv", "proj"}
    assert not any("ffn.bank" in name for name in parameter_table(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ffn": 70},
            r"model.parameter_tokens.ffn: 70, of which model.sparse.ffn.dense 5 are used by every position; the other "
            r"65 are no whole slots of model.sparse.ffn.group_size 16 tokens. Set "
            r"model.sparse.ffn.dense to 6, or model.parameter_tokens.ffn to 69 or 85.",
        ),
        (
            {"ffn": 64, "bank": {"group_size": 16, "candidates": 3, "dense": 17}},
            "the other 47 are no whole slots of .* Set model.sparse.ffn.dense to 16 or 32, or "
            "model.parameter_tokens.ffn to 49 or 65.$",
        ),
        (
            {"ffn": 64, "bank": {"group_size": 16, "candidates": 3, "dense": 65}},
            "which leaves none .* Set model.sparse.ffn.dense to 48, or model.parameter_tokens.ffn to 81.$",
        ),
        (
            {"ffn": 96, "bank": {"group_size": 64, "candidates": 3}},
            "the other 96 are no whole slots .* Set model.sparse.ffn.dense to 32, or model.sparse.ffn.group_size to "
            "16, 32, 48 or 96, or model.parameter_tokens.ffn to 64 or 128.$",
        ),
        (
            {"ffn": 5},
            "model.sparse.ffn.dense: 5 tokens are used by every position, which leaves none of "
            "model.parameter_tokens.ffn 5 for slots. Set model.parameter_tokens.ffn to 21.",
        ),
        (
            {"ffn": 48, "bank": {"group_size": 16, "candidates": 3, "dense": 64}},
            "model.sparse.ffn.dense: 64 tokens .* none of model.parameter_tokens.ffn 48 for slots. Set "
            "model.sparse.ffn.dense to 32, or model.parameter_tokens.ffn to 80.",
        ),
        (
            {"ffn": 101, "tensor": 4},
            r"parallel.tensor: 4 does not divide the 6 slots of model.sparse.ffn \(96 tokens in groups of 16\), and a "
            r"rank holds whole slots. Set parallel.tensor to 2, or model.parameter_tokens.ffn to 69 or 133.",
        ),
        (
            {"ffn": 5, "tensor": 2},
            "^model.sparse.ffn.dense: 5 tokens are used by every position, which leaves none .* to 21.$",
        ),
        (
            {"ffn": 133, "tensor": 8, "bank": {"group_size": 32, "candidates": 3, "dense": 5}},
            r"parallel.tensor: 8 does not divide the 4 slots .* Set parallel.tensor to 4, or "
            r"model.sparse.ffn.group_size to 16, or model.parameter_tokens.ffn to 261.",
        ),
    ],
)
def test_what_does_not_divide(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(with_bank(**changes), changes.get("tensor", 1))


def test_sizes_of_the_tensor_group_divide_heads_and_slots():
    """Each message names sizes that the other rules allow as well."""
    for tensor, message in (
        (6, "parallel.tensor: 6 does not divide the 9 slots .* Set parallel.tensor to 3, or model.sparse.ffn"),
        (9, "parallel.tensor: 9 does not divide model.num_attention_heads 12. Set it to 3.$"),
    ):
        sizes = {"hidden_size": 96, "num_attention_heads": 12, "parameter_tokens": {**TOKENS, "ffn": 288}}
        bank = {"ffn": {"group_size": 32, "candidates": 3}}
        own = run_config(model={**sizes, "sparse": bank}, parallel={"tensor": tensor})
        with pytest.raises(ConfigError, match=message):
            validate(own, tensor)


def test_a_section_without_a_bank_and_slots_of_each_projection():
    empty = run_config(model={"parameter_tokens": TOKENS, "sparse": {}})
    remedy = r"Set model.sparse.ffn to {group_size: 32, candidates: 4, dense: 5}, or model.sparse to null."
    with pytest.raises(ConfigError, match=f"model.sparse: names none of the projections qkv, proj, ffn. {remedy}"):
        validate(empty, 1)
    bank = {"group_size": 16, "candidates": 2}
    for kind in ("qkv", "proj"):
        wrong = run_config(model={"parameter_tokens": {**TOKENS, kind: 24}, "sparse": {kind: bank}})
        with pytest.raises(ConfigError, match=rf"model.parameter_tokens.{kind}: 24, of which .* to 16 or 32.$"):
            validate(wrong, 1)


def test_costs_are_those_of_the_used_tokens_and_the_router():
    sparse, small = with_bank().model, without_banks().model
    assert num_parameters(sparse) == sum(p.numel() for p in build_model(sparse).parameters())
    groups, layers, width = 12, 2, 32
    assert num_parameters(sparse) - num_parameters(small) == layers * (2 * 8 * 16 * width + groups * (width + 1))
    assert flops_per_token(sparse) - flops_per_token(small) == 6 * layers * groups * (width + 1)
    assert "ffn 69 of 197 (3 candidates in each of 4 slots of 16)" in describe(with_bank(), 1)
    assert initial_scales(sparse) == initial_scales(small)


def test_the_official_format_refuses():
    check_format(without_banks().model, "official", "converted")
    check_format(with_bank().model, "huggingface", "exported")
    with pytest.raises(
        CheckpointError,
        match="cannot be converted: the official format has no place for model.sparse.*Export it by to-hf",
    ):
        check_format(with_bank().model, "official", "converted")


def test_what_knows_dense_projections_only_refuses():
    check_prunable(without_banks().model, {**TOKENS, "ffn": 9})
    check_prunable(with_bank().model, {**TOKENS, "qkv": 9})
    message = (
        "^model.sparse.ffn: the ffn projections cannot lose some of their 69 tokens, because positions choose 64 of "
        "them among 3 "
        "candidates in each of 4 slots of 16 tokens. Give --candidates ffn=1, which makes the projection dense, and "
        "prune that model$"
    )
    with pytest.raises(CheckpointError, match=message):
        check_prunable(with_bank().model, {**TOKENS, "ffn": 9})
    with pytest.raises(
        CheckpointError, match="(?s)qkv.*proj.*ffn.* Give --candidates qkv=1,proj=1,ffn=1, which makes"
    ) as refused:
        check_prunable(with_banks().model, {"qkv": 8, "proj": 8, "ffn": 8})
    assert str(refused.value).count("Give") == 1
    with pytest.raises(ConfigError) as caught:
        larger = with_bank(ffn=101)
        growth = Growth(source="x", method="gram")
        scales_after_growth(with_bank().model, larger.model, growth, initial_scales(with_bank().model))
    assert caught.value.problems == [
        "growth.method: gram grows projections of one key and one value tensor, and model.sparse.ffn has candidates. "
        "Set the method to zero_key."
    ]
    assert growth_problems(with_bank().model, with_bank(bank={"group_size": 16, "candidates": 4, "dense": 5}).model)
    assert growth_problems(without_banks().model, with_bank().model)


def test_the_planner_sees_gathers_and_all_gradients():
    """A step takes longer than a dense one of as many used tokens: rows are gathered, and more gradients reduced."""
    gpu = GPUS["h100"]
    sparse, small = with_bank(), without_banks()
    assert block_seconds(sparse, gpu, Assumptions()).backward > block_seconds(small, gpu, Assumptions()).backward
    assert sent_bytes_per_step(sparse, 2)["data"] > 1.5 * sent_bytes_per_step(small, 2)["data"]
