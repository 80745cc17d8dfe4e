"""Any layout loads what any other wrote: bit-equal state, and training that goes on as if nothing had happened."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.source import CheckpointSource, InitialSource, grown_source
from megatron_tf.checkpoint.writer import save_checkpoint
from megatron_tf.config.schema import Growth
from megatron_tf.config.validate import plan_batches
from megatron_tf.errors import CheckpointError
from megatron_tf.parallel.environment import LaunchEnvironment
from megatron_tf.parallel.groups import make_group
from megatron_tf.parallel.topology import Topology
from megatron_tf.params import parameter_table
from megatron_tf.training.distributed import join, leave
from megatron_tf.training.growth_proof import compare, probe
from megatron_tf.training.layout_check import Layout, batches, reference


def start(rank, world, folder):
    torch.set_num_threads(1)
    return join(LaunchEnvironment("torchrun", rank, world, rank, world, "localhost", 0), 120.0, f"{folder}/store")


def engine_for(layout, config, source, model=None):
    from megatron_tf.training.engine import Engine

    config = layout.apply(config)
    plan = plan_batches(config, layout.topology.world_size)
    group = make_group(layout.topology, "tensor", 120.0)
    return Engine(config, model or config.model, plan, layout.topology, group, source), config, plan


def train(engine, config, plan, layout, first, last, rank):
    data = layout.topology.coordinate("data", rank)
    return [
        float(engine.train_step(s, batches(config, plan, s, data, layout.topology.data)).loss)
        for s in range(first, last)
    ]


def save(engine, config, root, step, rank, world, history=()):
    table = parameter_table(config.model)
    index = CheckpointIndex(
        step=step, samples=8 * step, tokens=128 * step, model=config.model.model_dump(mode="json"),
        scales=engine.scales, tensors=expected_tensors({n: s.shape for n, s in table.items()}),
        adam_steps=engine.adam_steps(), growth_history=history, run=engine.loss_scaler(),
    )  # fmt: skip
    return save_checkpoint(root, engine.pieces(), index, rank=rank, world_size=world, token=f"t-{step}")


def equal_to_checkpoint(engine, reader):
    """Every piece this rank would save is bit-equal to what the checkpoint holds there."""
    pieces = engine.pieces()
    assert all(torch.equal(p.tensor.cpu(), reader.read(p.name, p.state, p.start, p.stop)) for p in pieces)
    count = torch.tensor(sum(p.stop - p.start for p in pieces))
    dist.all_reduce(count)
    return int(count)


def _through_layouts(rank, config, layouts, folder):
    """Four steps under each layout, each starting from what the one before saved."""
    world = layouts[0].topology.world_size
    start(rank, world, folder)
    try:
        if config.training.precision == "fp16":
            # DeepSpeed refuses fp16 on processors without its instructions; torch emulates them well enough for this
            from deepspeed.accelerator import get_accelerator

            get_accelerator().is_fp16_supported = lambda: True
        losses, path, step = [], None, 0
        for layout in layouts:
            reader = None if path is None else open_checkpoint(path)
            source = InitialSource(config.model, config.run.seed) if reader is None else CheckpointSource(reader)
            engine, own, plan = engine_for(layout, config, source)
            total = 3 * sum(spec.numel for spec in parameter_table(config.model).values())
            if reader is not None:
                engine.load_loss_scaler(dict(reader.index.run))
                assert equal_to_checkpoint(engine, reader) == total
                assert engine.adam_steps() == dict(reader.index.adam_steps)
                assert engine.loss_scaler() == dict(reader.index.run)
            losses += train(engine, own, plan, layout, step, step + 4, rank)
            step += 4
            path = save(engine, own, f"{folder}/checkpoints", step, rank, world)
            engine.close()
        if rank == 0:
            Path(folder, "losses.json").write_text(json.dumps(losses))
    finally:
        leave()


def run(function, world, *arguments):
    torch.multiprocessing.spawn(function, arguments, nprocs=world)


def losses_through(layouts, config, folder):
    run(_through_layouts, layouts[0].topology.world_size, config, layouts, str(folder))
    return json.loads((folder / "losses.json").read_text())


FOUR = [Layout(Topology(2, 2, 1), True), Layout(Topology(1, 1, 4)), Layout(Topology(4, 1, 1)), Layout(Topology(1, 2, 2)),
        Layout(Topology(2, 1, 2), True)]  # fmt: skip
TWO = [Layout(Topology(1, 1, 2)), Layout(Topology(2, 1, 1), True), Layout(Topology(1, 2, 1))]


def test_four_ranks_fp32(config, tmp_path):
    expected = reference(config(), 20).losses
    assert losses_through(FOUR, config(), tmp_path) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision, tolerance", [("bf16", 2e-2), ("fp16", 2e-2)])
def test_two_ranks_in_half_precision(config, tmp_path, precision, tolerance):
    """fp32 masters are restored bit for bit (checked inside); the losses follow the fp32 run within rounding."""
    half = config(training={"precision": precision}, deepspeed={"fp16": {"initial_scale_power": 8}})
    expected = reference(config(), 12).losses
    assert losses_through(TWO, half, tmp_path) == pytest.approx(expected, rel=tolerance)


def test_masters_start_from_unrounded_weights_in_bf16(config, tmp_path):
    run(_masters, 2, config(training={"precision": "bf16"}), str(tmp_path))


def _masters(rank, config, folder):
    start(rank, 2, folder)
    try:
        source = InitialSource(config.model, config.run.seed)
        engine, *_ = engine_for(Layout(Topology(2, 1, 1)), config, source)
        weights = [p for p in engine.pieces() if p.state == "weight"]
        assert all(torch.equal(p.tensor, source.read(p.name, p.state, p.start, p.stop)) for p in weights)
        assert any((p.tensor != p.tensor.bfloat16().float()).any() for p in weights)
    finally:
        leave()


def test_zero_stage_0_and_1_share_checkpoints(config, tmp_path):
    expected = reference(config(), 8).losses
    run(_zero_stages, 2, config(zero={"stage": 0}), config(), str(tmp_path))
    assert json.loads((tmp_path / "losses.json").read_text()) == pytest.approx(expected, rel=1e-5)


def _zero_stages(rank, without, with_zero, folder):
    layout = Layout(Topology(1, 1, 2))
    start(rank, 2, folder)
    try:
        engine, own, plan = engine_for(layout, without, InitialSource(without.model, without.run.seed))
        losses = train(engine, own, plan, layout, 0, 4, rank)
        path = save(engine, own, f"{folder}/checkpoints", 4, rank, 2)
        engine.close()
        engine, own, plan = engine_for(layout, with_zero, CheckpointSource(open_checkpoint(path)))
        losses += train(engine, own, plan, layout, 4, 8, rank)
        if rank == 0:
            Path(folder, "losses.json").write_text(json.dumps(losses))
    finally:
        leave()


def test_growth_keeps_the_function_under_another_layout(config, tmp_path):
    bigger = config(model={"parameter_tokens": {"qkv": 29, "proj": 11, "ffn": 75}})
    run(_grow, 4, config(), bigger, str(tmp_path))


def _grow(rank, small, big, folder):
    before, after = Layout(Topology(1, 2, 2)), Layout(Topology(2, 2, 1), True)
    device = start(rank, 4, folder)
    try:
        engine, own, plan = engine_for(before, small, InitialSource(small.model, small.run.seed))
        train(engine, own, plan, before, 0, 4, rank)
        reader = open_checkpoint(save(engine, own, f"{folder}/checkpoints", 4, rank, 4))
        engine.close()
        held = list(batches(after.apply(small), plan_batches(after.apply(small), 4), 99, 0, 1))
        engine, *_ = engine_for(after, small, CheckpointSource(reader))
        first = probe(engine, held)
        engine.close()
        growth = Growth.model_validate({"from": "unused"})
        engine, own, plan = engine_for(after, big, grown_source(reader, big.model, growth, big.run.seed))
        assert abs(probe(engine, held).loss - first.loss) <= 1e-6 * first.loss
        assert "held batch" in compare(first, probe(engine, held), "fp32", device)
        assert engine.scales["blocks.0.ffn"] == 37**0.5  # held
        ages = engine.adam_steps()["blocks.0.ffn.key_tokens"]
        assert ages == ((0, 37 * 32, 4), (37 * 32, 75 * 32, 0))
        train(engine, own, plan, after, 0, 6, rank)
        grown = open_checkpoint(save(engine, own, f"{folder}/grown", 6, rank, 4))
        new_values = grown.read("blocks.0.ffn.key_tokens", "weight", 37 * 32, 75 * 32)
        assert (new_values.view(-1, 32).norm(dim=1) > 0).all()  # every new key has learnt
        assert grown.index.adam_steps["blocks.0.ffn.key_tokens"][1][2] == 6
        # a model that differs is noticed
        other, *_ = engine_for(after, small, InitialSource(small.model, 99))
        with pytest.raises(Exception, match="changed the function"):
            compare(first, probe(other, held), "fp32", device)
    finally:
        leave()


def test_drifted_copies_are_an_error(config):
    with tempfile.TemporaryDirectory() as folder:
        run(_drift, 4, config(), folder)


def _drift(rank, config, folder):
    layout = Layout(Topology(2, 2, 1))
    start(rank, 4, folder)
    try:
        engine, *_ = engine_for(layout, config, InitialSource(config.model, config.run.seed))
        engine.check_replicas()
        shards = {shard.spec.name: shard.parameter for shard in engine._pipeline.shards()}
        if rank == 3:
            with torch.no_grad():
                shards["final_norm.weight"][5] += 1e-6
                shards["embedding.weight"][0, 0] += 1e-6
        with pytest.raises(CheckpointError, match="drifted") as error:
            engine.check_replicas()
        assert "final_norm.weight from row 0: ranks [2] differ from ranks [3]" in str(error.value)
        assert "embedding.weight from row 49: ranks [1] differ from ranks [3]" in str(error.value)
    finally:
        leave()
