from __future__ import annotations

import pytest

from megatron_tf.config.run_plan import plan_batches, topology_for
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.errors import ConfigError


def problems_of(config, world_size):
    with pytest.raises(ConfigError) as error:
        validate(config, world_size)
    return error.value.problems


def test_a_valid_config_passes_at_every_size_that_fits(small):
    for world_size in (1, 2, 4, 8):
        validate(small(), world_size)
    validate(small("parallel={tensor: 2, pipeline: 4, sequence: true}"), 16)


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_ranks_left_over_are_data_parallel(small):
    assert topology_for(small("parallel={tensor: 2, pipeline: 4}"), 24) == Topology(tensor=2, pipeline=4, data=3)
    assert topology_for(small(), 1) == Topology()


def test_batch_plan(small):
    plan = plan_batches(small("parallel.tensor=2"), 4)
    assert (plan.micro_batch_size, plan.num_micro_batches, plan.data_parallel) == (2, 4, 2)
    assert plan.global_batch_size == 16
    assert plan.tokens_per_step == 16 * 32
    assert (plan.train_steps, plan.train_tokens) == (100, 100 * 16 * 32)


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (511, 1), (512, 1), (513, 2), (5120, 10), (5121, 11)])
def test_train_tokens_are_rounded_up_to_whole_steps(small, tokens, steps):
    config = small("training.train_steps=null", f"training.train_tokens={tokens}", "optimizer.schedule.warmup_steps=0")
    plan = plan_batches(config, 2)
    assert plan.train_steps == steps
    assert plan.train_tokens == steps * 512 >= tokens


def test_steps_and_tokens_do_not_depend_on_the_layout(small):
    config = small("training.train_steps=null", "training.train_tokens=9999")
    lengths = {
        (p.train_steps, p.train_tokens, p.global_batch_size) for p in (plan_batches(config, w) for w in (1, 2, 8))
    }
    assert len(lengths) == 1


def test_another_batch_size_on_resume_keeps_the_number_of_tokens_and_the_place_in_the_schedule(small):
    small_step, big_step = 16 * 32, 32 * 32
    lengths = ["training.train_steps=null", f"training.train_tokens={100 * small_step}"]
    bigger = small(*lengths, "training.global_batch_size=32")
    plan = plan_batches(bigger, 1, step=60, tokens=60 * small_step, schedule_unit=small_step)
    assert plan.train_steps == 60 + 20  # the 40 steps left are 20 of twice the size
    assert plan.schedule_position(60) == 60 and plan.schedule_position(70) == 80
    assert plan.schedule_position(80) == plan.schedule_steps == 100
    # and back again: what counts is the unit of the beginning
    back = plan_batches(small(*lengths), 1, 70, 60 * small_step + 10 * big_step, small_step)
    assert (back.train_steps, back.schedule_position(70), back.schedule_steps) == (90, 80, 100)
    assert plan_batches(bigger, 1, step=200, tokens=100 * small_step).train_steps == 200  # nothing left
    fresh, resumed = plan_batches(small(*lengths), 1), plan_batches(small(*lengths), 1, 60, 60 * small_step, small_step)
    assert (fresh.train_steps, fresh.schedule_steps) == (resumed.train_steps, resumed.schedule_steps)
    assert all(fresh.schedule_position(step) == resumed.schedule_position(step) == step for step in range(60, 100))


def test_plans_refuse_what_they_cannot_compute(small):
    with pytest.raises(ConfigError, match="multiple of 2 ranks"):
        plan_batches(small("parallel.tensor=2"), 3)
    with pytest.raises(ConfigError, match="multiple of 2 ranks"):
        topology_for(small("parallel.tensor=2"), 3)
    with pytest.raises(ConfigError, match="is not a multiple of 6"):
        plan_batches(small(), 3)
    with pytest.raises(ConfigError, match="neither train_steps nor train_tokens"):
        plan_batches(small("training.train_steps=null"), 1)


# ---- each rule, with its sentence ------------------------------------------------------------------------------------


def test_a_length_in_samples_is_one_in_tokens(small):
    of_tokens = small("training.train_steps=null", "training.train_tokens=32000")
    samples = 32000 // of_tokens.model.seq_length
    of_samples = small("training.train_steps=null", f"training.train_samples={samples}")
    assert plan_batches(of_samples, 1, 3, 96) == plan_batches(of_tokens, 1, 3, 96)


@pytest.mark.parametrize(
    ("overrides", "world_size", "problem"),
    [
        (["parallel={tensor: 2, pipeline: 2}"], 6,
         "parallel: tensor 2 × pipeline 2 needs a multiple of 4 ranks, but there are 6. Start 4 or 8 ranks, or choose "
         "parallel.tensor × parallel.pipeline to be 1, 2, 3 or 6."),
        (["parallel.tensor=4"], 2,
         "parallel: tensor 4 × pipeline 1 needs a multiple of 4 ranks, but there are 2. Start 4 ranks, or choose "
         "parallel.tensor × parallel.pipeline to be 1 or 2."),
        (["training.global_batch_size=18"], 2,
         "training.global_batch_size: 18 is not a multiple of 4 (training.micro_batch_size 2 × 2 data-parallel ranks). "
         "Set it to 16 or 20, or training.micro_batch_size to 1, 3 or 9."),
        (["training.global_batch_size=9"], 2,
         "training.global_batch_size: 9 is not a multiple of 4 (training.micro_batch_size 2 × 2 data-parallel ranks). "
         "Set it to 8 or 12."),
        (["training.global_batch_size=2", "training.micro_batch_size=8"], 1,
         "training.global_batch_size: 2 is not a multiple of 8 (training.micro_batch_size 8 × 1 data-parallel ranks). "
         "Set it to 8, or training.micro_batch_size to 1 or 2."),
        (["training.train_steps=null"], 1,
         "training: neither train_steps nor train_tokens nor train_samples is given. Give one of them."),
        (["training.train_tokens=512"], 1,
         "training: both train_steps (100) and train_tokens (512) are given. Give one; an override removes the other "
         "with training.train_steps=null or training.train_tokens=null."),
        (["model.num_attention_heads=5"], 1,
         "model.hidden_size: 64 is not a multiple of model.num_attention_heads 5. Set it to 60 or 65, or the heads to "
         "4 or 8."),
        (["model.num_attention_heads=100"], 1,
         "model.hidden_size: 64 is not a multiple of model.num_attention_heads 100. Set it to 100, or the "
         "heads to 64."),
        (["model.rotary_fraction=0.2"], 1,
         "model.rotary_fraction: 0.2 of 16 channels a head rotates 3 channels, but they are rotated in pairs. "
         "Set it to 0.125 or 0.25."),
        (["parallel.pipeline=5"], 5 * 8,
         "parallel.pipeline: 5 stages, but model.num_layers is 4 and each stage needs a layer. Set it to at most 4."),
        (["parallel.tensor=3", "model.vocab_size=257"], 3,
         "parallel.tensor: 3 does not divide model.num_attention_heads 4. Set it to 2 or 4."),
        (["parallel.tensor=4", "model.parameter_tokens.proj=3"], 4,
         "model.parameter_tokens.proj: 3 rows cannot be split over parallel.tensor 4 ranks. Set it to at least 4, or "
         "parallel.tensor to at most 3."),
        (["parallel.tensor=4", "model.vocab_size=2"], 4,
         "model.vocab_size: 2 rows cannot be split over parallel.tensor 4 ranks. Set it to at least 4, or "
         "parallel.tensor to at most 2."),
        (["parallel.sequence=true"], 1,
         "parallel.sequence: true splits hidden states over the tensor ranks, but parallel.tensor is 1. Set it to "
         "false, or parallel.tensor to 2 or more."),
        (["parallel={tensor: 4, sequence: true}", "model.seq_length=30"], 4,
         "model.seq_length: 30 is not a multiple of parallel.tensor 4, which parallel.sequence needs. Set it to 28 or "
         "32, or parallel.sequence to false."),
        (["training.norm=gram", "model.activation=softmax"], 1,
         "training.norm: gram finds the norm of scores before their activation, which model.activation softmax does "
         "not "
         "have. Set it to auto, or the activation to l2_norm_gelu."),
        (["training.norm=gram", "model.sparse={ffn: {group_size: 16, candidates: 2}}",
          "model.parameter_tokens.ffn=192"], 1,
         "training.norm: gram is for projections whose positions use all their tokens, but model.sparse is given. Set "
         "it to auto, or model.sparse to null."),
        (["training.scores=recompute", "model.sparse={ffn: {group_size: 16, candidates: 2}}",
          "model.parameter_tokens.ffn=192"], 1,
         "training.scores: recompute is for projections whose positions use all their tokens, but model.sparse is "
         "given. "
         "Set it to keep, or model.sparse to null."),
        (["training.scores=recompute", "model.architecture=transformer", "model.ffn_hidden_size=64",
          "model.parameter_tokens=null"], 1,
         "training.scores: recompute, but a transformer has no parameter tokens, and so no scores of them. Set it to "
         "keep."),
        (["optimizer.schedule.warmup_steps=101"], 1,
         "optimizer.schedule.warmup_steps: 101 is more than the run's 100 steps. Set it to at most 100; 1 % "
         "would be 1."),
        (["growth={from: a, lr_multipliers: {new_tokens: 4, new_tokens_decay_steps: 101}}"], 1,
         "growth.lr_multipliers.new_tokens_decay_steps: 101 is more than the run's 100 steps. Set it to at most 100."),
        (["growth={from: a, lr_multipliers: {new_tokens_decay_steps: 50}}"], 1,
         "growth.lr_multipliers.new_tokens_decay_steps: 50, but growth.lr_multipliers.new_tokens is 1 already. Set "
         "new_tokens to what it begins with, such as 4, or remove new_tokens_decay_steps."),
        (["growth={from: a, lr_multipliers: {new_tokens: 4, new_tokens_decay_shape: cosine}}"], 1,
         "growth.lr_multipliers.new_tokens_decay_shape: cosine says how growth.lr_multipliers.new_tokens goes to 1, "
         "but new_tokens_decay_steps is not given. Give it, or remove the shape."),
        (["optimizer.schedule.min_lr=1e-3"], 1,
         "optimizer.schedule.min_lr: 0.001 is above optimizer.lr 0.0006. Set it to at most 0.0006."),
        (["zero.stage=0", "training.precision=bf16"], 1,
         "zero.stage: 0 with training.precision bf16 is refused, because DeepSpeed does not implement it with fp32 "
         "accumulation of bf16 gradients. Set zero.stage to 1, or training.precision to fp32."),
        (["training.precision=fp8", "model.activation=softmax"], 1,
         "training.precision: fp8 is for activations whose norm is known before the scores, and model.activation "
         "softmax is none of them. Set it to bf16, or the activation to l2_norm_gelu."),
        (["training.precision=fp8", "training.norm=direct"], 1,
         "training.precision: fp8 needs norms that are known before the scores, and training.norm is direct. Set it "
         "to bf16, or training.norm to auto."),
        (["training.precision=fp8", "model.sparse={ffn: {group_size: 16, candidates: 2, dense: 14}}"], 1,
         "training.precision: fp8 is for projections whose positions use all their tokens, but model.sparse is given. "
         "Set it to bf16, or model.sparse to null."),
        (["training.precision=fp8", "model.architecture=transformer", "model.ffn_hidden_size=64",
          "model.parameter_tokens=null"], 1,
         "training.precision: fp8 is for products with parameter tokens, which a transformer does not have. Set it to "
         "bf16."),
        (["zero.stage=0", "training.precision=fp16"], 1,
         "zero.stage: 0 with training.precision fp16 is refused, because DeepSpeed's results are then wrong, even on "
         "one "
         "rank. Set zero.stage to 1, or training.precision to fp32."),
        (["deepspeed.fp16.min_loss_scale=32", "deepspeed.fp16.initial_scale_power=4"], 1,
         "deepspeed.fp16.min_loss_scale: 32 is above the first loss scale, 16, which is 2 to the power of "
         "deepspeed.fp16.initial_scale_power 4. Set it to at most 16."),
        (["zero.stage=0", "parallel.pipeline=2"], 2,
         "zero.stage: 0 with parallel.pipeline 2 is refused, because DeepSpeed then leaves parameters of later stages "
         "out "
         "of the gradient norm. Set zero.stage to 1, or parallel.pipeline to 1."),
        (["evaluation.interval_steps=5", "data.validation=[]"], 1,
         "evaluation.interval_steps: 5, but data.validation is empty. Give data.validation, or remove "
         "evaluation.interval_steps."),
        (["model.architecture=transformer", "model.parameter_tokens=null", "model.num_key_value_heads=3"], 1,
         "model.num_key_value_heads: 3 does not divide model.num_attention_heads 4, and each of its heads serves as "
         "many "
         "query heads as any other. Set it to 2 or 4."),
        (["parallel.tensor=4", "model.architecture=transformer", "model.parameter_tokens=null",
          "model.num_key_value_heads=2"], 4,
         "parallel.tensor: 4 does not divide model.num_key_value_heads 2. Set it to 2."),
        (["parallel.tensor=4", "model.architecture=transformer", "model.parameter_tokens=null",
          "model.ffn_hidden_size=3"], 4,
         "model.ffn_hidden_size: 3 rows cannot be split over parallel.tensor 4 ranks. Set it to at least 4, or "
         "parallel.tensor to at most 3."),
        (["growth.from=./runs/small/"], 1,
         "growth.from: ./runs/small/ is this run's own folder (run.dir runs/small). Give the smaller run's folder, or "
         "another run.dir."),
    ],
)  # fmt: skip
def test_rule(small, overrides, world_size, problem):
    assert problems_of(small("training.global_batch_size=48", *overrides), world_size) == [problem]


def test_zero_stage_0_is_allowed_where_it_is_right(small):
    validate(small("zero.stage=0", "parallel.tensor=2"), 4)


def test_every_suggested_rotary_fraction_is_valid(small):
    hidden_sizes = [64, 100, 196, 320, 4 * 49, 4 * 98]
    for hidden_size in hidden_sizes:
        head_size = hidden_size // 4
        for channels in range(1, head_size + 1, 2):
            fraction = min(1.0, (channels + 0.5) / head_size)
            overrides = [f"model.hidden_size={hidden_size}", f"model.rotary_fraction={fraction}"]
            (problem,) = problems_of(small(*overrides), 1)
            for suggestion in problem.partition("Set it to ")[2].rstrip(".").split(" or "):
                validate(small(*overrides, f"model.rotary_fraction={suggestion}"), 1)


def test_every_suggested_batch_is_valid(small):
    for global_size in range(1, 40):
        for micro in (1, 2, 3, 5):
            config = small(f"training.global_batch_size={global_size}", f"training.micro_batch_size={micro}")
            if global_size % (micro * 2) == 0:
                validate(config, 2)
                continue
            (problem,) = problems_of(config, 2)
            sizes, _, micro_sizes = (
                problem.partition("Set it to ")[2].rstrip(".").partition(", or training.micro_batch_size to ")
            )
            for size in sizes.split(" or "):
                validate(small(f"training.global_batch_size={size}", f"training.micro_batch_size={micro}"), 2)
            for size in filter(None, micro_sizes.replace(" or ", ", ").split(", ")):
                validate(small(f"training.global_batch_size={global_size}", f"training.micro_batch_size={size}"), 2)


def test_all_problems_come_at_once(small):
    config = small(
        "parallel={tensor: 3, pipeline: 5, sequence: true}",
        "model.hidden_size=66",
        "training.train_tokens=5",
        "optimizer.schedule.min_lr=1",
        "training.precision=bf16",
        "zero.stage=0",
    )
    keys = [problem.split(":")[0] for problem in problems_of(config, 4)]
    assert keys == [
        "parallel",
        "training",
        "model.hidden_size",
        "parallel.pipeline",
        "parallel.tensor",
        "model.seq_length",
        "optimizer.schedule.min_lr",
        "zero.stage",
        "zero.stage",
    ]
