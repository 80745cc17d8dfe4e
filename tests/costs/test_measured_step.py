"""State and sent bytes of a whole step, measured through DeepSpeed, against the estimates."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import spawn

from megatron_tf.benchmark.counting import Counting
from megatron_tf.config import load_config
from megatron_tf.config.run_plan import plan_batches, topology_for
from megatron_tf.costs.communication import sent_bytes_per_step
from megatron_tf.costs.estimate import parameter_state_bytes
from megatron_tf.data.documents import boundaries
from megatron_tf.parallel.groups import make_group

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.yml"
TOLERANCE = 0.10
SMALL = (
    "model.seq_length=32",
    "model.vocab_size=512",
    "training.micro_batch_size=2",
    "training.global_batch_size=8",
)


def step_of_engine(group, overrides):
    """State and sent bytes of one real step, through DeepSpeed."""
    os.environ.update(LOCAL_RANK=str(group.rank), RANK=str(group.rank), WORLD_SIZE=str(group.size))
    from megatron_tf.engine.deepspeed.patches import attach
    from megatron_tf.state.sources import InitialSource

    attach()
    from megatron_tf.engine.deepspeed.engine import DeepSpeedEngine

    config = load_config(CONFIG, [*SMALL, *overrides])
    topology, batches = topology_for(config, group.size), plan_batches(config, group.size)
    tensor = make_group(topology, "tensor", 60.0)
    engine = DeepSpeedEngine(config, config.model, batches, topology, tensor, InitialSource(config.model,
                                                                                            config.run.seed),
                    document_ends=boundaries(config.data, 0).ends)  # fmt: skip
    ids = torch.zeros(config.training.micro_batch_size, config.model.seq_length, dtype=torch.int64)
    data = iter(lambda: (ids, ids), None)
    engine.train_step(0, data)  # the first one also tells shapes to the next stage
    with Counting() as counted:
        engine.train_step(1, data)
    # of two ranks: a whole tensor of an all-reduce, half of it in any other
    factor = {"all_reduce": 1, "send": 1}
    sent = sum(count * factor.get(kind, 1 / 2) * size for (kind, size), count in counted.sent.items())
    expected = sum(sent_bytes_per_step(config, group.size).values())
    everyone = [None] * group.size
    dist.all_gather_object(everyone, sent)
    assert max(everyone) == pytest.approx(expected, rel=0.01), (counted.sent, expected)

    parameters = [shard.parameter for shard in engine._pipeline.shards()]
    numel = sum(p.numel() for p in parameters)
    weights, _, optimizer = parameter_state_bytes(numel, config.training.precision, 1, topology.data)
    assert sum(p.numel() * p.element_size() for p in parameters) == weights
    buffers = {id(segment.buffer): segment.buffer for segment in engine.optimizer.segments}.values()
    held = sum(3 * 4 * buffer.numel() for buffer in buffers)  # a weight and two moments
    assert held == pytest.approx(optimizer, rel=TOLERANCE)
    fp32_sums = sum(flat.numel() * 4 for flat in getattr(engine._wrapper, "fp32_groups_gradients_flat", ()))
    assert fp32_sums == pytest.approx(4 * numel if config.training.precision == "bf16" else 0, rel=TOLERANCE)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("training.precision=bf16",),
        ("training.precision=fp32",),
        ("training.precision=bf16", "parallel.pipeline=2"),
        ("training.precision=bf16", "parallel.pipeline=2", "data.reset_at_eod=true", "data.mask_eod_loss=true"),
        ("training.precision=bf16", "parallel={tensor: 2, sequence: true}", "training.activation_checkpointing=true"),
    ],
    ids=["DP2 bf16", "DP2 fp32", "PP2", "PP2, boundaries", "TP2, recomputed"],
)
def test_a_step_of_the_engine(overrides):
    spawn(step_of_engine, 2, overrides)
