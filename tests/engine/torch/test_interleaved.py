"""Interleaved 1F1B: pipeline ranks that hold several parts of the depth compute what one process computes."""

from __future__ import annotations

import pytest
from layout_checks import BOUNDARIES, TOLERANCE, check_layouts, pipelines_of_four_ranks, recomputed_and_sharded
from tiny import run_config

from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.costs.estimate import memory_per_rank, num_parameters, stage_parameters
from megatron_tf.costs.hardware import Assumptions, find_gpu
from megatron_tf.costs.roofline import step_time
from megatron_tf.engine.choice import build_engine
from megatron_tf.errors import ConfigError
from megatron_tf.parallel.groups import make_group
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.sources import InitialSource
from megatron_tf.tasks.layers import example_batches
from megatron_tf.verification.layout import Layout, joined, layouts, reference
from megatron_tf.verification.resume import Setting, check_resumes

TWO_PARTS = Topology(pipeline=2, virtual_stages=2)


def config(layers=5, **changes):
    parallel = {"engine": "torch", **changes.pop("parallel", {})}
    return run_config(parallel=parallel, model={"num_layers": layers, **changes.pop("model", {})}, **changes)


def test_two_ranks():
    """Layers 0, 1 and 3 on the first rank, 2 and 4 on the last; micro batches of one sample."""
    assert TWO_PARTS.parts(5, 0) == [range(2), range(3, 4)]
    check_layouts(config(data=BOUNDARIES, training={"micro_batch_size": 1}), Layout(TWO_PARTS))


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "steps"), [(4, 2), pytest.param(8, 3, marks=pytest.mark.scale)])
def test_four_ranks_with_every_other_axis(samples, steps):
    layouts = pipelines_of_four_ranks(Topology(pipeline=2, data=2, virtual_stages=2))
    check_layouts(config(8, **recomputed_and_sharded(samples)), *layouts, steps=steps)


@pytest.mark.slow
def test_checkpoints_know_nothing_of_it():
    split, other = Setting(Layout(TWO_PARTS), engine="torch"), Setting(Layout(Topology(tensor=2), True))
    for result in check_resumes(config(parallel={"engine": "deepspeed"}), [(split, other), (other, split)], 2):
        assert result.agrees(TOLERANCE), result


def test_evaluation_goes_through_all_parts(tmp_path):
    start_ranks(_evaluate, 2, str(tmp_path), reference(config(), 1).losses[0])


def _evaluate(rank, folder, expected):
    of = Layout(TWO_PARTS).apply(config())
    with joined([of], rank, 2, folder):
        plan, tensor = plan_batches(of, 2), make_group(TWO_PARTS, "tensor", 60.0)
        engine = build_engine(of, of.model, plan, TWO_PARTS, tensor, InitialSource(of.model, of.run.seed))
        found = engine.evaluate_groups(example_batches(of, plan, 0, 0, 1), [0] * plan.global_batch_size, 1)
        assert found.loss == pytest.approx(expected, rel=1e-6)
        engine.close()


def test_the_layout_gate_knows_it():
    found = {layout.topology for layout in layouts(config(), 2)}
    assert TWO_PARTS in found and TWO_PARTS not in {layout.topology for layout in layouts(config(3), 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engine": "deepspeed", "pipeline": 2},
            "parallel.virtual_stages: 2 needs parallel.engine: torch, and it is deepspeed. Set parallel.engine to "
            "torch, or parallel.virtual_stages to 1.",
        ),
        (
            {},
            "parallel.virtual_stages: 2 needs a pipeline, and parallel.pipeline is 1. Set parallel.virtual_stages to "
            "1, or parallel.pipeline to 2.",
        ),
        (
            {"pipeline": 2, "schedule": "gpipe"},
            "parallel.virtual_stages: 2 needs parallel.schedule: 1f1b or zero_bubble, and it is gpipe. Set "
            "parallel.schedule to 1f1b, or parallel.virtual_stages to 1.",
        ),
        (
            {"pipeline": 2, "virtual_stages": 3},
            "parallel.virtual_stages: 3 parts on each of 2 pipeline ranks need a layer each, but model.num_layers is "
            "5. Set it to at most 2.",
        ),
    ],
)
def test_what_cannot_be_interleaved(changes, message):
    with pytest.raises(ConfigError) as error:
        validate(config(parallel={"virtual_stages": 2, **changes}), 2)
    assert error.value.problems == [message]


def test_micro_batches_come_in_multiples_of_the_ranks():
    odd = config(training={"global_batch_size": 10}, parallel={"pipeline": 2, "virtual_stages": 2})
    message = (
        "parallel.virtual_stages: 2 needs micro batches in multiples of parallel.pipeline 2, and a step has 5 of them. "
        "Set training.global_batch_size to 8 or 12, or parallel.virtual_stages to 1."
    )
    with pytest.raises(ConfigError) as error:
        validate(odd, 2)
    assert error.value.problems == [message]


def test_the_plan_has_a_smaller_bubble_and_more_in_flight():
    plain = Layout(Topology(pipeline=4)).apply(config(8, training={"micro_batch_size": 1, "train_steps": 20}))
    parts = Layout(Topology(pipeline=4, virtual_stages=2)).apply(plain)
    gpu, assumed = find_gpu("H100"), Assumptions()
    assert step_time(parts, 4, gpu, assumed).bubble < 0.6 * step_time(plain, 4, gpu, assumed).bubble
    assert step_time(parts, 4, gpu, assumed).pipeline > step_time(plain, 4, gpu, assumed).pipeline
    # 11 passes of a layer instead of 4 of two
    assert memory_per_rank(parts, 4).activations == pytest.approx(
        memory_per_rank(plain, 4).activations * 11 / 8, rel=0.1
    )
    topology = Topology(pipeline=4, virtual_stages=2)
    held = sum(stage_parameters(plain.model, topology, stage) for stage in range(4))
    embedding = plain.model.vocab_size * plain.model.hidden_size
    assert held == num_parameters(plain.model) + embedding
