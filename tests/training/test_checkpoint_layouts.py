"""State on its way between checkpoints and engines: unrounded masters, growth under another layout, drifted copies."""

from __future__ import annotations

import tempfile

import pytest
import torch

from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.source import CheckpointSource
from megatron_tf.checkpoint.writer import save_checkpoint
from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.topology import Topology
from megatron_tf.engine.deepspeed.joining import join
from megatron_tf.errors import CheckpointError
from megatron_tf.growth.grow import grown_source
from megatron_tf.parallel.groups import make_group
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import leave
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.parameters import layer_of, parameter_table
from megatron_tf.state.sources import InitialSource
from megatron_tf.tasks.layers import example_batches
from megatron_tf.training.choices import Followed
from megatron_tf.training.growth_proof import compare, probe
from megatron_tf.verification.layout import Layout


def start(rank, world, folder):
    torch.set_num_threads(1)
    return join(LaunchEnvironment("torchrun", rank, world, rank, world, "localhost", 0), 120.0, f"{folder}/store")


def engine_for(layout, config, source, model=None):
    from megatron_tf.engine.deepspeed.engine import DeepSpeedEngine

    config = layout.apply(config)
    plan = plan_batches(config, layout.topology.world_size)
    group = make_group(layout.topology, "tensor", 120.0)
    return DeepSpeedEngine(config, model or config.model, plan, layout.topology, group, source), config, plan


def train(engine, config, plan, layout, first, last, rank):
    data = layout.topology.coordinate("data", rank)
    return [
        float(engine.train_step(s, example_batches(config, plan, s, data, layout.topology.data)).loss)
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


def test_masters_start_from_unrounded_weights_in_bf16(config, tmp_path):
    start_ranks(_masters, 2, config(training={"precision": "bf16"}), str(tmp_path))


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


def test_growth_keeps_the_function_under_another_layout(config, tmp_path):
    bigger = config(model={"parameter_tokens": {"qkv": 29, "proj": 11, "ffn": 75}})
    start_ranks(_grow, 4, config(), bigger, str(tmp_path))


def _grow(rank, small, big, folder):
    before, after = Layout(Topology(1, 2, 2)), Layout(Topology(2, 2, 1), True)
    device = start(rank, 4, folder)
    try:
        engine, own, plan = engine_for(before, small, InitialSource(small.model, small.run.seed))
        train(engine, own, plan, before, 0, 4, rank)
        reader = open_checkpoint(save(engine, own, f"{folder}/checkpoints", 4, rank, 4))
        engine.close()
        held = list(example_batches(after.apply(small), plan_batches(after.apply(small), 4), 99, 0, 1))
        engine, *_ = engine_for(after, small, CheckpointSource(reader))
        first = probe(engine.stage(), held)
        engine.close()
        growth = Growth.model_validate({"from": "unused"})
        engine, own, plan = engine_for(after, big, grown_source(reader, big.model, growth, big.run.seed))
        assert abs(probe(engine.stage(), held).loss - first.loss) <= 1e-6 * first.loss
        assert "held batch" in compare(first, probe(engine.stage(), held), Followed(), "fp32", device, preserves=True)
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
            compare(first, probe(other.stage(), held), Followed(), "fp32", device, preserves=True)
    finally:
        leave()


DEEPER = {"num_layers": 5, "parameter_tokens": {"qkv": 29, "proj": 11, "ffn": 75}}
TRANSFORMER = {"architecture": "transformer", "parameter_tokens": None, "ffn_hidden_size": 37}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("small", "big"),
    [({}, DEEPER), (TRANSFORMER, {**TRANSFORMER, "num_layers": 5})],
    ids=["tokenformer", "transformer"],
)
def test_depth_is_grown_under_other_layouts(config, tmp_path, small, big):
    """One layer a stage before, two and three after; also as the file operation, and by methods that copy layers."""
    start_ranks(_deepen, 4, config(model=small), config(model=big), str(tmp_path))


def _deepen(rank, small, big, folder):
    before, layouts = Layout(Topology(1, 2, 2)), [Layout(Topology(2, 2, 1), True), Layout(Topology(1, 1, 4))]
    device = start(rank, 4, folder)
    try:
        engine, own, plan = engine_for(before, small, InitialSource(small.model, small.run.seed))
        train(engine, own, plan, before, 0, 4, rank)
        reader = open_checkpoint(save(engine, own, f"{folder}/checkpoints", 4, rank, 4))
        engine.close()
        for layout in layouts:
            for method in ("identity", "stack", "interleave"):
                layers = 4 if method == "stack" else 5
                grown_model = big.model.model_copy(update={"num_layers": layers})
                growth = Growth(source="unused", depth_method=method)
                source = grown_source(reader, grown_model, growth, big.run.seed)
                to = big.model_copy(update={"model": grown_model})
                engine, own, plan = engine_for(layout, to, source)
                # the same at every layout, to the last bit
                for piece in engine.pieces():
                    assert torch.equal(piece.tensor, source.read(piece.name, piece.state, piece.start, piece.stop))
                held = list(example_batches(layout.apply(small), plan_batches(layout.apply(small), 4), 99, 0, 1))
                after = probe(engine.stage(), held)
                engine.close()
                engine, *_ = engine_for(layout, small, CheckpointSource(reader))
                first = probe(engine.stage(), held)
                engine.close()
                assert "held batch" in compare(first, after, Followed(), "fp32", device, preserves=source.preserves)
                assert (abs(after.loss - first.loss) <= 1e-6 * first.loss) == (method == "identity")
        engine, own, plan = engine_for(layouts[0], big, grown_source(reader, big.model, Growth(source="x"), 7))
        train(engine, own, plan, layouts[0], 0, 3, rank)
        trained = open_checkpoint(save(engine, own, f"{folder}/grown", 3, rank, 4))
        # old layers stand at 0 and 3; the others have learnt, and are younger
        for name, spec in parameter_table(big.model).items():
            layer = layer_of(name)
            ages = {steps for _, _, steps in trained.index.adam_steps[name]}
            assert max(ages) == (7 if layer in (None, 0, 3) else 3)
            assert spec.numel == 1 or trained.read(name, "exp_avg_sq", 0, spec.numel).any()
            assert trained.read(name, "weight", 0, spec.numel).any()
    finally:
        leave()


@pytest.mark.slow
def test_drifted_copies_are_an_error(config):
    for drift, ranks in ((_drift, 4), (_drift_of_data_ranks, 2)):
        with tempfile.TemporaryDirectory() as folder:
            start_ranks(drift, ranks, config(), folder)


def _drift_of_data_ranks(rank, config, folder):
    start(rank, 2, folder)
    try:
        engine, *_ = engine_for(Layout(Topology(1, 1, 2)), config, InitialSource(config.model, config.run.seed))
        engine.check_replicas()
        if rank == 1:
            with torch.no_grad():
                {shard.spec.name: shard.parameter for shard in engine.shards()}["blocks.1.ffn.key_tokens"][3] += 1e-6
        with pytest.raises(
            CheckpointError, match=r"apart: blocks.1.ffn.key_tokens from row 0: ranks \[0\] differ from"
        ):
            engine.check_replicas()
    finally:
        leave()


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
