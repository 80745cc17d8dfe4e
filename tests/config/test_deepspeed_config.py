"""What DeepSpeed is told. Each of these settings prevents a silent error of its defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tf.config.deepspeed_config import deepspeed_config
from megatron_tf.config.load import load_config
from megatron_tf.config.validate import plan_batches

TINY = Path(__file__).parents[2] / "configs" / "tiny.yml"


def made(*overrides):
    config = load_config(TINY, overrides)
    return deepspeed_config(config, plan_batches(config, 2))


def test_batch_arithmetic():
    values = made("training.global_batch_size=16", "training.micro_batch_size=2")
    assert values["train_batch_size"] == 16
    assert values["train_micro_batch_size_per_gpu"] == 2
    assert values["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_gradients_are_accumulated_and_reduced_in_fp32(precision):
    values = made(f"training.precision={precision}")
    assert values["data_types"] == {"grad_accum_dtype": "fp32"}
    assert values["communication_data_type"] == "fp32"
    assert [name for name in ("bf16", "fp16") if values[name]["enabled"]] == [precision] * (precision != "fp32")


def test_pipeline_keeps_gradients_whole():
    pipeline = made()["pipeline"]
    assert pipeline["use_reentrant"] is False  # reentrant checkpointing drops gradients with one stage
    assert pipeline["pipe_partitioned"] is pipeline["grad_partitioned"] is False  # wrong under sequence parallelism


def test_the_users_section_is_merged():
    values = made("deepspeed={zero_optimization: {reduce_bucket_size: 1000}, fp16: {initial_scale_power: 8}}")
    assert values["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}
    assert values["fp16"] == {"enabled": False, "initial_scale_power": 8}
