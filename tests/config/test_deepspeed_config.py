"""What DeepSpeed is told. Each of these settings prevents a silent error of its defaults."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tf.config.deepspeed_config import OWNED_KEYS, REFUSED_KEYS, deepspeed_config
from megatron_tf.config.load import load_config
from megatron_tf.config.run_plan import plan_batches
from megatron_tf.errors import ConfigError

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


def test_the_users_section_is_in_it():
    values = made("deepspeed={zero_optimization: {reduce_bucket_size: 1000}, fp16: {initial_scale_power: 8}}")
    assert values["zero_optimization"]["stage"] == 1 and values["zero_optimization"]["reduce_bucket_size"] == 1000
    assert values["fp16"]["enabled"] is False and values["fp16"]["initial_scale_power"] == 8


def test_the_users_section_leaves_deepspeeds_defaults():
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    values = made("zero.stage=1", "training.precision=fp16")
    assert DeepSpeedZeroConfig(**values["zero_optimization"]) == DeepSpeedZeroConfig(stage=1)
    assert DeepSpeedFP16Config(**values["fp16"]) == DeepSpeedFP16Config(enabled=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("largest", [False, True])
def test_deepspeed_takes_all_that_the_section_lets_through(precision, largest):
    """So that no value ends in a traceback of DeepSpeed's own validation."""
    from deepspeed.runtime.config import DeepSpeedConfig

    size, count, power, switch = (2**60 - 2, 2**31 - 1, 40, "true") if largest else (2, 1, 0, "false")
    fp16 = f"initial_scale_power: {power}, consecutive_hysteresis: {switch}, " + ", ".join(
        f"{key}: {count}" for key in ("loss_scale_window", "hysteresis", "min_loss_scale")
    )
    zero = f"reduce_bucket_size: {size}, allgather_bucket_size: {size}, " + ", ".join(
        f"{key}: {switch}"
        for key in ("overlap_comm", "contiguous_gradients", "reduce_scatter", "use_multi_rank_bucket_allreduce",
                    "allgather_partitions")
    )  # fmt: skip
    overrides = [f"deepspeed={{fp16: {{{fp16}}}, zero_optimization: {{{zero}}}}}", f"training.precision={precision}"]
    config = load_config(TINY, overrides)
    DeepSpeedConfig(deepspeed_config(config, plan_batches(config, 1)))  # batch arithmetic for one rank


def problem_of(override):
    with pytest.raises(ConfigError) as error:
        load_config(TINY, [override])
    (problem,) = error.value.problems
    return problem


@pytest.mark.parametrize("key", sorted(OWNED_KEYS))
@pytest.mark.parametrize("value", ["1", "{enabled: true}", "null"])
def test_keys_that_another_section_decides_are_refused(key, value):
    decided = f"deepspeed.{key}: this is decided by {OWNED_KEYS[key]}. Remove it here and set that instead."
    assert problem_of(f"deepspeed.{key}={value}") == decided


@pytest.mark.parametrize("key", sorted(REFUSED_KEYS))
def test_keys_that_break_a_promise_are_refused(key):
    assert problem_of(f"deepspeed.{key}=true") == f"deepspeed.{key}: refused, because {REFUSED_KEYS[key]}. Remove it."


def test_owners_exist():
    config = load_config(TINY)
    for owner in OWNED_KEYS.values():
        section, _, field = owner.partition(".")
        assert not field or hasattr(getattr(config, section), field), owner


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("deepspeed.zero_optimization=true", "deepspeed.zero_optimization: the truth value true, but a section"),
        ("deepspeed.fp16.initial_scale_power=5000", "deepspeed.fp16.initial_scale_power: 5000 is out of range"),
        ("deepspeed.zero_optimization.reduce_bucket_size=big",
         "deepspeed.zero_optimization.reduce_bucket_size: the text"),
        ("deepspeed.zero_optimization.overlap_com=true",
         "deepspeed.zero_optimization.overlap_com: unknown key. Did you "
         "mean deepspeed.zero_optimization.overlap_comm?"),
        ("deepspeed.elasticity={}", "deepspeed.elasticity: unknown key. The keys of deepspeed are fp16, "),
    ],
)  # fmt: skip
def test_wrong_values(override, problem):
    assert problem_of(override).startswith(problem)
