"""The loss scale of fp16: DeepSpeed's rule, and a step that knows nothing of it."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from tiny import run_config

from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.sections.deepspeed import DeepSpeedFp16
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.engine.choice import build_engine
from megatron_tf.engine.torch.loss_scale import LossScale
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.sources import InitialSource
from megatron_tf.tasks.layers import example_batches
from megatron_tf.verification.layout import joined, reference


@pytest.mark.parametrize("consecutive", [False, True])
@pytest.mark.parametrize("hysteresis", [1, 3])
def test_the_rule_is_that_of_deepspeed(hysteresis, consecutive, monkeypatch):
    from deepspeed.runtime.fp16 import loss_scaler

    monkeypatch.setattr(loss_scaler, "dist", SimpleNamespace(get_rank=lambda: 1))
    theirs = loss_scaler.DynamicLossScaler(2.0**6, 4, 2, hysteresis, consecutive, raise_error_at_min_scale=False)
    settings = {"initial_scale_power": 6, "loss_scale_window": 4, "hysteresis": hysteresis, "min_loss_scale": 2}
    own = LossScale(DeepSpeedFp16(**settings, consecutive_hysteresis=consecutive))
    chance, seen = random.Random(5), set()
    for step in range(400):
        overflow = chance.random() < (0.4 if step // 50 % 2 else 0.05)
        theirs.update_scale(overflow)
        own.update(overflow)
        assert own.state() == {key: getattr(theirs, key) for key in own.state()}
        assert own.can_fall == (theirs.cur_scale > 2)
        seen.add(own.value)
        if step % 100 == 99:
            fresh = LossScale(DeepSpeedFp16(**settings, consecutive_hysteresis=consecutive))
            fresh.load({**own.state(), "another": 1})
            own = fresh
    assert len(seen) > 4


def config(power):
    fp16 = {"initial_scale_power": power, "hysteresis": 1}
    changes = {"training": {"precision": "fp16"}, "deepspeed": {"fp16": fp16}}
    return run_config(parallel={"engine": "torch"}, **changes)


def test_steps_in_fp16(tmp_path):
    """A scale that is much too high is found down to one that works, and says nothing in loss, norm and weights."""
    validate(config(8), 1)
    expected = reference(run_config(), 2)
    start_ranks(_steps, 1, str(tmp_path), expected.losses, expected.grad_norms)


def _steps(rank, folder, losses, norms):
    of = config(8)
    plan = plan_batches(of, 1)
    with joined([of], rank, 1, folder):
        built = []
        for power in (8, 30):
            source = InitialSource(of.model, of.run.seed)
            built.append(build_engine(config(power), of.model, plan, Topology(), SINGLE, source))
        engine, high = built
        for step in range(2):
            result = engine.train_step(step, example_batches(of, plan, step, 0, 1))
            assert float(result.loss) == pytest.approx(losses[step], rel=2e-3)
            assert result.grad_norm == pytest.approx(norms[step], rel=2e-2)
            assert not result.skipped and result.loss_scale == 2.0**8
        before = [piece.tensor.clone() for piece in high.pieces()]
        result = high.train_step(0, example_batches(of, plan, 0, 0, 1))
        assert result.skipped and result.seeks_scale and result.loss_scale == 2.0**29 and high.nonfinite_gradients()
        assert all(torch.equal(a, piece.tensor) for a, piece in zip(before, high.pieces()))
        while result.skipped:
            result = high.train_step(0, example_batches(of, plan, 0, 0, 1))
        assert float(result.loss) == pytest.approx(losses[0], rel=2e-3) and result.loss_scale < 2.0**29
        for engine in built:
            engine.close()
