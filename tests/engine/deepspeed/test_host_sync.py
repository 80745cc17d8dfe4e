"""No step makes the host wait for the GPU more than a step must: counted on a CPU, where the same operators run."""

from __future__ import annotations

import traceback
from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.topology import Topology
from megatron_tf.engine.deepspeed.joining import join
from megatron_tf.parallel.groups import make_group
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import leave
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.sources import InitialSource
from megatron_tf.tasks.layers import example_batches

# Operators whose result, or its shape, the host must know before it can go on.
SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim")


class Waits(TorchDispatchMode):
    """Where such operators were called from, innermost first, this project's or DeepSpeed's."""

    def __init__(self):
        super().__init__()
        self.callers = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in SYNCHRONISING:
            frames = [
                f for f in traceback.extract_stack() if "/deepspeed/" in f.filename or "megatron_tf/" in f.filename
            ]
            self.callers[" < ".join(f"{f.filename.rsplit('/', 1)[-1]}:{f.name}" for f in reversed(frames[-3:]))] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step(config, tmp_path, precision):
    start_ranks(_count, 1, config(training={"precision": precision}), str(tmp_path))


def _count(rank, config, folder):
    from megatron_tf.engine.deepspeed.engine import DeepSpeedEngine

    join(LaunchEnvironment("torchrun", 0, 1, 0, 1, "localhost", 0), 120.0, f"{folder}/store")
    try:
        plan, topology = plan_batches(config, 1), Topology()
        engine = DeepSpeedEngine(config, config.model, plan, topology, make_group(topology, "tensor", 120.0),
                        InitialSource(config.model, 1))  # fmt: skip
        engine.train_step(0, example_batches(config, plan, 0, 0, 1))
        data = list(example_batches(config, plan, 1, 0, 1))
        with Waits() as waits:
            engine.train_step(1, iter(data))
        # what is left is DeepSpeed's look at the norm of the gradient before the update, once a step
        assert sum(waits.callers.values()) <= 2, waits.callers
        assert all("is_invalid_grad_norm" in caller or "clip_tensors" in caller for caller in waits.callers), (
            waits.callers
        )
    finally:
        leave()
