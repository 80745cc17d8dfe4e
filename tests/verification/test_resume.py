"""Any layout loads what any other wrote: bit-equal state, and training that goes on as if nothing had happened.

tools/verify_resume.py tries every layout and every change.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from saving import StateOnly

from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.writer import save_checkpoint
from megatron_tf.config.topology import Topology
from megatron_tf.state.parameters import parameter_table
from megatron_tf.verification import resume
from megatron_tf.verification.layout import Layout
from megatron_tf.verification.resume import Resumed, Setting, check_resumes, rotation, settings


def setting(tensor, pipeline, data, sequence=False, zero_stage=1, engine="deepspeed"):
    return Setting(Layout(Topology(tensor, pipeline, data), sequence), zero_stage, engine)


def check(config, pairs, steps=2, tolerance=1e-5):
    for result in check_resumes(config, pairs, steps):
        assert result.agrees(tolerance), result


def test_settings_are_the_valid_ones(config):
    found = settings(config(model={"num_layers": 4}), 4)
    assert len(set(found)) == len(found) and setting(1, 1, 1) in found and setting(1, 4, 1) in found
    assert all(s.world_size in (1, 2, 4) for s in found)
    assert setting(2, 1, 2, True, engine="torch") in found
    assert Setting(Layout(Topology(context=4)), engine="torch") in found
    assert settings(config(model={"num_layers": 4}), 4, ["deepspeed"]) == [s for s in found if s.engine == "deepspeed"]
    without_zero = [s for s in found if not s.zero_stage]
    assert setting(2, 1, 2, True, 0) in without_zero
    assert all(s.layout.topology.pipeline == 1 for s in without_zero)
    half = settings(config(training={"precision": "bf16"}), 2)
    assert half and all(s.zero_stage == 1 for s in half)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_rotation_leaves_and_enters_each_once(count):
    found = [setting(1, 1, number) for number in range(1, count + 1)]
    before, after = zip(*rotation(found))
    assert list(before) == found and sorted(after, key=str) == sorted(found, key=str)


@pytest.mark.slow
def test_four_ranks(config):
    mixed = [setting(2, 2, 1, True), setting(1, 1, 4), setting(1, 2, 2), setting(2, 1, 2, True)]
    check(config(), list(zip(mixed, [*mixed[1:], mixed[0]])))


def test_one_and_two_ranks_with_and_without_zero(config):
    one = setting(1, 1, 1, zero_stage=0)
    check(config(), [(one, setting(2, 1, 1, True)), (setting(1, 1, 2, zero_stage=0), setting(1, 2, 1)),
                     (setting(1, 2, 1), one), (setting(1, 1, 2), setting(2, 1, 1, zero_stage=0))])  # fmt: skip


@pytest.mark.slow
def test_a_transformer(config):
    model = {"architecture": "transformer", "parameter_tokens": None, "ffn_hidden_size": 37}
    check(config(model=model), [(setting(1, 1, 1), setting(2, 1, 1, True)), (setting(2, 1, 1, True), setting(1, 2, 1)),
                                (setting(1, 2, 1), setting(1, 1, 2))])  # fmt: skip


@pytest.mark.slow
@pytest.mark.scale
@pytest.mark.timeout(1200)
def test_every_layout_of_up_to_four_ranks(config):
    tall = config(model={"num_layers": 4}, training={"micro_batch_size": 4})
    check(tall, rotation(settings(tall, 4, ["deepspeed"])), steps=10)


def test_from_one_engine_to_the_other(config):
    torch_alone = setting(1, 1, 2, engine="torch")
    check(config(), [(torch_alone, setting(2, 1, 1)), (setting(1, 2, 1), torch_alone)], steps=2)


@pytest.mark.slow
def test_from_one_engine_to_the_other_on_four_ranks(config):
    mixed = [
        setting(2, 1, 2),
        setting(1, 2, 2, engine="torch"),
        setting(1, 1, 4),
        setting(2, 1, 2, True, engine="torch"),
        setting(2, 2, 1, engine="torch"),
    ]
    check(config(), rotation(mixed), steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(config, precision):
    """fp32 masters and the loss scaler are restored bit for bit; the losses follow the fp32 run within rounding."""
    half = config(training={"precision": precision}, deepspeed={"fp16": {"initial_scale_power": 8}})
    pairs = [(setting(1, 1, 2), setting(2, 1, 1, True)), (setting(2, 1, 1, True), setting(1, 2, 1))]
    other = setting(1, 1, 2, engine="torch")
    check(half, [*pairs, (pairs[0][0], other), (other, pairs[0][0])], tolerance=2e-2)


def test_a_loss_or_a_state_that_differs_does_not_agree():
    one = setting(1, 1, 1)
    assert Resumed(one, one, 1e-6, ()).agrees(1e-5)
    assert not Resumed(one, one, 1e-4, ()).agrees(1e-5)
    assert not Resumed(one, one, float("nan"), ()).agrees(1e-5)
    assert not Resumed(one, one, 0.0, ("a, weight",)).agrees(1e-5)


def test_the_smallest_difference_of_the_state_is_named(config, tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = config().model
        engine = StateOnly(model)
        engine.update()
        tensors = expected_tensors({name: spec.shape for name, spec in parameter_table(model).items()})
        index = CheckpointIndex(1, 8, 128, model.model_dump(mode="json"), engine.scales, tensors, engine.adam_steps(),
                                run={"cur_scale": 2.0})  # fmt: skip
        reader = open_checkpoint(save_checkpoint(tmp_path, engine.pieces(), index, rank=0, world_size=1, token="t"))
        state = replace(resume._copy_of(engine), loss_scaler={"cur_scale": 2.0})
        assert resume._differences(state, reader) == []
        name, kind, *_, tensor = state.pieces[4]
        tensor[7] = torch.nextafter(tensor[7], torch.tensor(9.0))
        assert resume._differences(state, reader) == [f"{name}, {kind}"]
        older = [(*part[:3], part[3] + 1) for part in state.ages[:1]]
        broken = replace(state, pieces=state.pieces[:-1], ages=older, loss_scaler={"cur_scale": 1.0})
        lost = state.pieces[-1][-1].numel()
        held = sum(len(piece[-1]) for piece in state.pieces)
        assert resume._differences(broken, reader) == sorted(
            [f"{name}, {kind}", "embedding.weight, adam_steps", "loss scaler, cur_scale",
             f"{held - lost:,} elements instead of {held:,}"]
        )  # fmt: skip
    finally:
        dist.destroy_process_group()
