"""The arithmetic of plans, against published figures and by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.config import load_config
from megatron_tf.config.run_plan import plan_batches, topology_for
from megatron_tf.config.stages import load_stages
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.costs.chain import chain_costs
from megatron_tf.costs.checkpoints import (
    LLAMA_3_FAILURES_PER_GPU_YEAR,
    checkpoint_bytes,
    daly_interval,
    lost_share,
    mean_seconds_between_failures,
    plan_checkpoints,
    young_interval,
)
from megatron_tf.costs.estimate import parameter_state_bytes
from megatron_tf.costs.hardware import GPUS, Assumptions, find_gpu, group_bandwidth
from megatron_tf.costs.law import cost_ratio
from megatron_tf.costs.layouts import estimate, ranked
from megatron_tf.costs.roofline import step_time
from megatron_tf.costs.summary import Circumstances, plan
from megatron_tf.errors import ConfigError
from megatron_tf.state.sources import InitialSource, StepZero

CONFIGS = Path(__file__).parents[2] / "configs"
ASSUMED = Assumptions()
H100 = GPUS["h100"]


def load(name, *overrides):
    return load_config(CONFIGS / f"{name}.yml", overrides)


def test_failures_of_llama_3():
    """arXiv:2407.21783: 16,384 GPUs were interrupted 419 times in 54 days, so every 3.1 hours."""
    mean = mean_seconds_between_failures(LLAMA_3_FAILURES_PER_GPU_YEAR, 16384)
    assert mean / 3600 == pytest.approx(3.1, rel=0.01)
    assert mean_seconds_between_failures(0.0, 16384) == math.inf


def test_memory_of_zero():
    """arXiv:1910.02054, figure 1: 7.5 B parameters, 64 ranks, fp16 Adam, ZeRO 1: 31.4 GB of state."""
    assert sum(parameter_state_bytes(7_500_000_000, "fp16", 1, 64)) == pytest.approx(31.4e9, rel=0.05)


def test_bubble_of_megatron():
    """arXiv:2104.04473, section 2.2: the bubble is (p − 1)/m of the ideal time."""
    config = load("pile_1.5B", "parallel.pipeline=4", "training.global_batch_size=512", "training.micro_batch_size=4")
    time = step_time(config, 32, H100, ASSUMED)
    micro_batches = plan_batches(config, 32).num_micro_batches
    assert micro_batches == 16
    assert time.bubble / (time.compute + time.tensor + time.pipeline) == pytest.approx(3 / 16)


@pytest.mark.parametrize(("stall", "mean"), [(1.0, 1e4), (60.0, 86400.0), (300.0, 3600.0)])
def test_daly_loses_the_least(stall, mean):
    """Daly's own model of the time of a run: each interval ends well with probability e^{−(τ + δ)/M}."""

    def time_per_work(interval):
        return mean * math.expm1((interval + stall) / mean) / interval

    best = min(time_per_work(mean * step / 1000) for step in range(1, 4000))
    assert time_per_work(daly_interval(stall, mean)) <= best * 1.0005
    assert daly_interval(stall, mean) == pytest.approx(young_interval(stall, mean), rel=0.3)


def test_interval_when_checkpoints_take_longer_than_failures():
    assert daly_interval(100.0, 40.0) == 40.0
    assert lost_share(1.0, 100.0, 0.0, 0.0, 40.0) == 1.0


def checkpoints(**changes):
    given = {
        "asynchronous": True, "configured_steps": 1000, "failures_per_gpu_year": 1.0, "storage_bytes_per_second": 1e9,
        "restart_seconds": 600.0, "num_gpus": 1000,
    }  # fmt: skip
    return plan_checkpoints(load("1.4B").model, 1000, 2.0, **{**given, **changes})


def test_checkpoint_interval():
    plan = checkpoints()
    assert plan.bytes == 12 * 1_309_705_728 == checkpoint_bytes(load("1.4B").model)
    assert plan.write == pytest.approx(15.7, rel=0.01) and plan.stall < 0.01
    assert plan.interval_steps * 2.0 == pytest.approx(max(plan.write, young_interval(plan.stall, 31536.0)), abs=2.0)
    assert plan.lost_share < plan.configured_lost_share
    blocking = checkpoints(asynchronous=False)
    assert blocking.stall == blocking.write and blocking.interval_steps > plan.interval_steps
    neighbours = [
        checkpoints(asynchronous=False, configured_steps=round(blocking.interval_steps * factor)).configured_lost_share
        for factor in (0.5, 0.8, 1.25, 2.0)
    ]
    assert all(share > blocking.lost_share for share in neighbours)
    assert checkpoints(failures_per_gpu_year=0.0).interval_steps is None
    # a background save that is not done makes the next one wait
    assert checkpoints(storage_bytes_per_second=1e6, configured_steps=1).configured_lost_share > 0.99


def test_links_of_groups():
    topology = Topology(tensor=2, pipeline=2, data=16)  # 64 GPUs, 8 nodes
    assert group_bandwidth(H100, topology, "tensor") == (450e9, False)
    assert group_bandwidth(H100, topology, "data") == (4 * 50e9, True)  # 4 of a group on each node
    assert group_bandwidth(H100, topology, "pipeline") == (50e9, True)
    small = Topology(tensor=2, pipeline=2, data=2)
    assert group_bandwidth(H100, small, "pipeline") == group_bandwidth(H100, small, "data") == (450e9, False)
    wide = Topology(tensor=16)
    assert group_bandwidth(H100, wide, "tensor") == (8 * 50e9, True)


def test_step_time_is_bounded_by_the_roofline():
    config = load("pile_1.5B")
    time = step_time(config, 64, H100, ASSUMED)
    assert 0.1 < time.mfu < ASSUMED.gemm
    parts = (time.compute, time.tensor, time.pipeline, time.bubble, time.data, time.update)
    assert sum(parts) == pytest.approx(time.total) and min(parts) >= 0
    # the same work on twice the GPUs takes more than half the time
    assert 0.5 < step_time(config, 128, H100, ASSUMED).total / time.total < 1
    slow_network = find_gpu("h100", network_gb_per_s=1.0)
    assert step_time(config, 64, slow_network, ASSUMED).data > 10 * time.data
    assert step_time(config, 64, GPUS["a100"], ASSUMED).total > time.total
    kept = load("pile_1.5B", "training.activation_checkpointing=false")
    assert 1.2 < time.compute / step_time(kept, 64, H100, ASSUMED).compute < 1.4
    # what is done to the scores of softmax is left to the compiler, having no kernels of its own
    softmax, compiled = (
        load("pile_1.5B", "model.activation=softmax", f"training.compile={on}") for on in ("false", "true")
    )
    assert step_time(compiled, 64, H100, ASSUMED).compute < step_time(softmax, 64, H100, ASSUMED).compute


@pytest.mark.parametrize(("samples", "tokens_per_second", "ratio"), [(16, 213_570, 0.58), (32, 280_617, 0.62)])
def test_candidates_take_as_long_as_measured_on_an_h100(samples, tokens_per_second, ratio):
    """docs/performance.md, "A layer with candidates on a GPU": one optimizer step of so many samples, against 124M.

    Of 32 samples only the ratio agrees within 10 %: there the step of 124M itself is measured 1.23 times as fast.
    """
    sizes = {"micro_batch_size": samples, "global_batch_size": samples, "compile": "true"}
    own = [f"training.{key}={value}" for key, value in sizes.items()]
    speeds = [
        step_time(load(name, *own), 1, H100, ASSUMED).tokens_per_second for name in ("sparse_124M_to_762M", "124M")
    ]
    assert speeds[0] / speeds[1] == pytest.approx(ratio, rel=0.1)
    if samples == 16:
        assert speeds[0] == pytest.approx(tokens_per_second, rel=0.1)


def test_only_products_of_candidates_take_longer_by_the_assumption_about_them():
    dense_speed = replace(ASSUMED, grouped=1.0)
    slower, faster = (step_time(load("sparse_124M_to_762M"), 8, H100, own) for own in (ASSUMED, dense_speed))
    assert 1.1 < slower.compute / faster.compute < 1.4
    assert (slower.data, slower.update) == (faster.data, faster.update)
    assert step_time(load("124M"), 8, H100, ASSUMED) == step_time(load("124M"), 8, H100, dense_speed)
    assert "those of candidates 28%" in ASSUMED.sentences()[0]
    assert "those of candidates 70%" in dense_speed.sentences()[0]


def test_tiny_models_wait_for_kernels_to_start():
    config = load("tiny", "training.micro_batch_size=1")
    at_once = replace(ASSUMED, launch=0.0)
    assert step_time(config, 1, H100, at_once).compute < 0.2 * step_time(config, 1, H100, ASSUMED).compute


def test_every_gpu_has_a_peak():
    for gpu in GPUS.values():
        assert gpu.peak_flops("bf16") == gpu.peak_flops("fp16") > gpu.peak_flops("fp32") > 1e13
    with pytest.raises(ConfigError, match="--gpu: 'h1000' is not known. Choose among a100"):
        find_gpu("h1000")


@pytest.mark.parametrize("world", [8, 96, 4096])
def test_ranked_layouts_are_valid_and_fit(world):
    config = load("pile_1.5B", "training.global_batch_size=3072", "training.micro_batch_size=1")
    best = ranked(config, world, H100, ASSUMED)
    times = [choice.time.total for choice in best]
    assert len(best) > 10 and times == sorted(times)
    for choice in best:
        validate(choice.config, world)
        assert ASSUMED.fits(choice.memory.total, H100)
        assert topology_for(choice.config, world).tensor <= H100.per_node
    assert len({str(choice) for choice in best}) == len(best)
    chosen = load("pile_1.5B", "training.global_batch_size=3072", *best[0].overrides())
    assert estimate(chosen, world, H100, ASSUMED).time.total == times[0]


def test_memory_rules_layouts_out():
    config = load("pile_1.5B", "training.micro_batch_size=1")
    on_small = ranked(config, 8, GPUS["rtx4090"], ASSUMED)
    on_large = ranked(config, 8, GPUS["h200"], ASSUMED)
    assert 0 < len(on_small) < len(on_large)
    assert max(choice.memory.total for choice in on_small) < 24e9 < max(choice.memory.total for choice in on_large)
    assert ranked(config, 1, GPUS["rtx4090"], ASSUMED) == []  # 20 bytes a parameter are 32 GB


def test_chain_costs_by_hand():
    configs = load_stages(CONFIGS / "chain_124M_to_1.4B.yml")
    stages = [estimate(config, 8, H100, ASSUMED) for config in configs]
    costs = chain_costs(stages)
    assert [cost.name for cost in costs] == ["chain-124M", "chain-354M", "chain-757M", "chain-1.4B"]
    base = costs[0].tokens
    assert base == pytest.approx(300e9, rel=1e-5) and costs[3].tokens == pytest.approx(60e9, rel=1e-5)
    assert costs[3].chain_tokens == sum(cost.tokens for cost in costs)
    assert costs[3].chain_gpu_hours == pytest.approx(sum(cost.gpu_hours for cost in costs))
    assert costs[0].gpu_hours == costs[0].scratch_gpu_hours[0] == costs[0].chain_gpu_hours
    assert costs[0].gpu_hours == pytest.approx(8 * base / stages[0].time.tokens_per_second / 3600)
    assert (costs[0].kappa, costs[0].break_even, costs[0].ratio) == (None, None, (1.0, 1.0))


def test_decays_of_delivered_sizes_serve_their_own_size_alone():
    path, deliver = CONFIGS / "chain_124M_to_1.4B.yml", {"decay": 0.2}
    plain = [estimate(config, 8, H100, ASSUMED) for config in load_stages(path)]
    overrides = [f"deliver={{decay: {deliver['decay']}}}"]
    small, middle, *_, last = chain_costs(
        [estimate(config, 8, H100, ASSUMED) for config in load_stages(path, overrides)], (0.5, 0.5)
    )
    of_plain = chain_costs(plain, (0.5, 0.5))
    assert (small.tokens, small.flops, last.flops) == (of_plain[0].tokens, of_plain[0].flops, of_plain[3].flops)
    assert small.chain_tokens == small.tokens
    assert middle.chain_tokens - middle.tokens == pytest.approx(0.8 * small.tokens, rel=1e-4)
    assert middle.chain_flops - middle.flops == pytest.approx(0.8 * small.flops, rel=1e-4)
    assert middle.chain_gpu_hours - middle.gpu_hours == pytest.approx(0.8 * small.gpu_hours, rel=1e-4)
    assert middle.scratch_tokens[0] == pytest.approx(middle.tokens + 0.5 * 0.8 * small.tokens, rel=1e-4)
    assert middle.break_even == pytest.approx(of_plain[1].break_even)


def test_a_stage_from_scratch_needs_what_kappa_says():
    """Its own tokens, and κ for each of those before; R is then φ + (1 − φ)·(c_s/c_l)/κ."""
    stages = [estimate(config, 8, H100, ASSUMED) for config in load_stages(CONFIGS / "chain_124M_to_1.4B.yml")]
    _, _, before, last = chain_costs(stages, (0.2, 0.8))
    assert last.kappa == (0.2, 0.8)
    for end, kappa in enumerate(last.kappa):
        scratch = last.tokens + kappa * before.chain_tokens
        assert last.scratch_tokens[end] == scratch
        assert last.scratch_flops[end] == pytest.approx(last.flops * scratch / last.tokens)
        assert last.scratch_gpu_hours[end] == pytest.approx(last.gpu_hours * scratch / last.tokens)
        assert last.ratio[1 - end] == pytest.approx(cost_ratio(last.tokens / scratch, last.break_even, kappa))
    assert last.ratio[0] < 1
    # at break-even, growing costs what scratch costs
    even = chain_costs(stages, (last.break_even, last.break_even))[3]
    assert even.ratio == (pytest.approx(1.0), pytest.approx(1.0))
    with pytest.raises(
        ConfigError, match="--scratch-tokens: 1,000,000,000, but stage .* trains on .* tokens of its own"
    ):
        chain_costs(stages, scratch_tokens=1_000_000_000)
    given = chain_costs(stages, scratch_tokens=96_000_000_000)[1]
    assert given.scratch_tokens == (pytest.approx(96e9), pytest.approx(96e9))
    assert given.kappa[0] == given.kappa[1] == pytest.approx(36 / 300, rel=1e-4)


@pytest.mark.parametrize("tensor", [2, 4, 8])
@pytest.mark.parametrize("name", ["354M", "757M", "1.4B"])
def test_auto_takes_no_form_of_the_norm_that_is_slower_by_the_estimate(name, tensor):
    def seconds(norm):
        config = load(name, f"parallel={{tensor: {tensor}, sequence: true}}", f"training.norm={norm}")
        return step_time(config, 8, H100, ASSUMED).total

    assert seconds("auto") <= min(seconds("direct"), seconds("gram"))


def test_a_growth_is_checked_against_its_parent_where_that_is_here(tmp_path):
    def summary(*overrides):
        circumstances = Circumstances(2, H100, 0.1, 1e9, 60, num_best=1)
        source = f"growth.from={tmp_path / 'small'}"
        return plan([load("tiny_split", source, *overrides)], circumstances)["stages"][0]

    away = summary("growth.method=gram")
    assert away["problems"] == []
    assert away["growth"].endswith("no checkpoint can be read here: whether it can grow was not checked")
    (problem,) = summary("model.sparse=null")["problems"]  # needs no parent to be known
    assert "split copies tokens to candidates, and the model has none, or one a slot." in problem
    (problem,) = summary("model.sparse=null", "growth.method=bank")["problems"]
    assert "where D is the smaller model's tokens and G a multiple of 16" in problem
    small = load("tiny").model
    start = StepZero(InitialSource(small, 3), 0, 0, ())
    path = write_step_zero(tmp_path / "small" / "checkpoints", small, start, {}, lambda done, text: None)
    assert summary()["problems"] == [] and summary()["growth"] == f"from {path}, 1,573,120 parameters"
    (problem,) = summary("growth.method=gram")["problems"]
    assert "model.sparse.ffn: null before, {group_size: 64, candidates: 4} after. Growth by gram makes no" in problem
