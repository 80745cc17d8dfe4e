"""Zero-bubble pipelines: gradients of weights that are made later are those of one pass, and the waits are shorter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist
from layout_checks import BOUNDARIES, check_layouts, pipelines_of_four_ranks, recomputed_and_sharded
from tiny import run_config
from torch.distributed.pipelining import schedules

from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.costs.estimate import memory_per_rank
from megatron_tf.costs.hardware import Assumptions, find_gpu
from megatron_tf.costs.roofline import step_time
from megatron_tf.costs.work import later_seconds
from megatron_tf.engine.choice import build_engine
from megatron_tf.engine.torch import pipeline as torch_pipeline
from megatron_tf.errors import ConfigError
from megatron_tf.parallel.groups import make_group
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.sources import InitialSource
from megatron_tf.tasks.layers import example_batches
from megatron_tf.verification.layout import Layout, joined

# of a forward pass, a backward pass to the inputs, one to the weights, and one to both
UNITS = {"F": 1, "I": 1, "W": 1, "B": 2}
PASSES = {"FORWARD": "F", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W", "FULL_BACKWARD": "B"}


def config(layers=5, schedule="zero_bubble", **changes):
    parallel = {"engine": "torch", "schedule": schedule, **changes.pop("parallel", {})}
    return run_config(parallel=parallel, model={"num_layers": layers, **changes.pop("model", {})}, **changes)


def test_two_ranks():
    layouts = Layout(Topology(pipeline=2)), Layout(Topology(pipeline=2, virtual_stages=2))
    check_layouts(config(data=BOUNDARIES, training={"micro_batch_size": 1}), *layouts)


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "steps"), [(4, 2), pytest.param(8, 3, marks=pytest.mark.scale)])
def test_four_ranks_with_every_other_axis(samples, steps):
    layouts = pipelines_of_four_ranks(Topology(pipeline=2, data=2))
    check_layouts(config(8, **recomputed_and_sharded(samples)), *layouts, steps=steps)


@pytest.mark.slow
def test_other_layers():
    """Matrices leave their gradients too; banks of candidates, which leave none, and norms from KᵀK are right."""
    layout = Layout(Topology(pipeline=2))
    plain = {"architecture": "transformer", "parameter_tokens": None, "num_key_value_heads": 2}
    check_layouts(config(model=plain), layout)
    bank = {"group_size": 16, "candidates": 4, "dense": 0}
    sparse = {"parameter_tokens": {"qkv": 13, "proj": 16, "ffn": 64}, "sparse": {"proj": bank, "ffn": bank}}
    check_layouts(config(model=sparse), layout)
    check_layouts(config(training={"norm": "gram"}), layout)


@pytest.mark.slow
def test_bf16_sums_gradients_in_fp32(tmp_path):
    """With a sharded stage, as with 1F1B; only the order in which micro batches are added differs."""
    start_ranks(_train_in_bf16, 2, str(tmp_path))


def _train_in_bf16(rank, folder):
    norms = []
    layout, training = Layout(Topology(pipeline=2)), {"precision": "bf16", "micro_batch_size": 1}
    of = {name: layout.apply(config(schedule=name, training=training)) for name in ("1f1b", "zero_bubble")}
    with joined(of.values(), rank, 2, folder):
        for own in of.values():
            engine, plan = _engine(own, layout.topology, 2)
            norms.append(
                [engine.train_step(step, example_batches(own, plan, step, 0, 1)).grad_norm for step in range(2)]
            )
            engine.close()
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def _engine(of, topology, ranks):
    plan, tensor = plan_batches(of, ranks), make_group(topology, "tensor", 60.0)
    return build_engine(of, of.model, plan, topology, tensor, InitialSource(of.model, of.run.seed)), plan


@pytest.mark.slow
def test_four_ranks_wait_as_long_as_planned(tmp_path):
    start_ranks(_count_waits, 4, str(tmp_path))


def _count_waits(rank, folder):
    """By the passes that the ranks make, in their order, with the units of time above."""
    with joined([config()], rank, 4, folder):
        for schedule, parts in (("1f1b", 1), ("1f1b", 2), ("zero_bubble", 1), ("zero_bubble", 2)):
            topology = Topology(pipeline=4, virtual_stages=parts)
            of = Layout(topology).apply(config(8, schedule, training={"micro_batch_size": 1}))
            with pytest.MonkeyPatch.context() as patch:
                made = _recorded(patch)
                engine, plan = _engine(of, topology, 4)
                engine.train_step(0, example_batches(of, plan, 0, 0, 1))
                engine.close()
            orders = [None] * 4
            dist.all_gather_object(orders, made)
            assert _waited(orders, parts, plan.num_micro_batches) == _planned(schedule, 4, parts)


def _recorded(patch):
    """The list of (pass, stage, micro batch) that this rank makes from now on."""
    made = []
    stage = torch_pipeline._TimedStage
    forward, backward, weight = (
        getattr(stage, name) for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")
    )

    def record(call, name_of):
        def recording(self, number, *args, **kwargs):
            made.append((name_of(kwargs), self.stage_index, number))
            return call(self, number, *args, **kwargs)

        return recording

    patch.setattr(stage, "forward_one_chunk", record(forward, lambda _: "F"))
    patch.setattr(
        stage, "backward_one_chunk", record(backward, lambda given: "B" if given.get("full_backward", True) else "I")
    )
    patch.setattr(stage, "backward_weight_one_chunk", record(weight, lambda _: "W"))
    return made


def _waited(orders, parts, micro_batches):
    """Units of time that a rank waits in a step, where each begins a pass as soon as it can."""
    last, ended = parts * len(orders) - 1, {}
    clocks, left = [0.0] * len(orders), [list(order) for order in orders]
    while any(left):
        ready = False
        for rank, order in enumerate(left):
            while order:
                kind, stage, number = order[0]
                needs = [("F", stage - 1, number)] if kind == "F" and stage else []
                if kind in "IB":
                    needs = [("G", stage + 1, number) if stage < last else ("F", stage, number)]
                if not all(need in ended for need in needs):
                    break
                clocks[rank] = max([clocks[rank], *(ended[need] for need in needs)]) + UNITS[kind] / parts
                ended["G" if kind in "IB" else kind, stage, number] = clocks[rank]
                del order[0]
                ready = True
        assert ready, "ranks wait for each other"
    return max(clocks) - 3 * micro_batches


def _planned(schedule, ranks, parts):
    """(P − 1)/v times a slot, or what is left of it without twice the gradients of weights."""
    return (ranks - 1) / parts * (1 if schedule == "zero_bubble" else 3)


@pytest.mark.parametrize(("ranks", "parts"), [(8, 1), (8, 4), (16, 2), (32, 1), (64, 1), (64, 4)])
def test_more_ranks_wait_as_long_as_planned(ranks, parts):
    kinds = {"1f1b": schedules.ScheduleInterleaved1F1B, "zero_bubble": schedules.ScheduleInterleavedZeroBubble}
    for schedule, kind in kinds.items():
        shape = SimpleNamespace(
            pp_group_size=ranks, n_local_stages=parts, _n_microbatches=2 * ranks, number_of_rounds=2,
            microbatches_per_round=ranks,
        )  # fmt: skip
        orders = [
            [
                (PASSES[action.computation_type.name], action.stage_index, action.microbatch_index)
                for action in kind._calculate_single_rank_operations(shape, rank)
                if action is not None
            ]
            for rank in range(ranks)
        ]
        assert _waited(orders, parts, 2 * ranks) == pytest.approx(_planned(schedule, ranks, parts))


def test_the_plan_has_a_smaller_bubble_and_what_waits():
    gpu, assumed = find_gpu("H100"), Assumptions()
    training = {"micro_batch_size": 1, "train_steps": 20}
    plain, zero = (
        Layout(Topology(pipeline=4)).apply(config(8, name, training=training)) for name in ("1f1b", "zero_bubble")
    )
    saved = step_time(plain, 4, gpu, assumed).bubble - step_time(zero, 4, gpu, assumed).bubble
    assert saved == pytest.approx(3 * 2 * 2 * later_seconds(zero, gpu, assumed))
    assert later_seconds(plain, gpu, assumed) == 0
    assert memory_per_rank(zero, 4).activations > memory_per_rank(plain, 4).activations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"compile": True}},
            "parallel.schedule: zero_bubble leaves gradients of weights for later, and training.compile: true compiles "
            "them into one pass with the others. Set training.compile to false, or parallel.schedule to 1f1b.",
        ),
        (
            {"training": {"scores": "recompute"}},
            "parallel.schedule: zero_bubble keeps scores for the gradients of weights, and training.scores: recompute "
            "keeps none. Set training.scores to keep, or parallel.schedule to 1f1b.",
        ),
        (
            {"training": {"global_batch_size": 10}},
            "parallel.schedule: zero_bubble needs micro batches in multiples of parallel.pipeline 2, and a step has 5 "
            "of them. Set training.global_batch_size to 8 or 12, or parallel.schedule to 1f1b.",
        ),
        (
            {"training": {"global_batch_size": 2}},
            "parallel.schedule: zero_bubble needs a micro batch for each of parallel.pipeline 2 stages, and a step has "
            "1 of them. Set it to gpipe, or training.micro_batch_size to 1, or training.global_batch_size to 4.",
        ),
        (
            {"parallel": {"pipeline": 1}},
            "parallel.schedule: zero_bubble is an order of micro batches in a pipeline, and parallel.pipeline is 1. "
            "Set parallel.schedule to 1f1b, or parallel.pipeline to 2 or more.",
        ),
        (
            {"parallel": {"engine": "deepspeed"}},
            "parallel.schedule: zero_bubble needs parallel.engine: torch, and it is deepspeed. Set "
            "parallel.engine to torch, or parallel.schedule to 1f1b.",
        ),
    ],
)
def test_what_leaves_nothing_for_later(changes, message):
    parallel = {"pipeline": 2, **changes.pop("parallel", {})}
    with pytest.raises(ConfigError) as error:
        validate(config(parallel=parallel, **changes), 2)
    assert error.value.problems == [message]


def test_one_process_has_no_order():
    """What a pipeline is compared with is a run that can be."""
    alone = Layout(Topology()).apply(config())
    assert alone.parallel.schedule == "1f1b"
    validate(alone, 1)
