from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_tf.engine.torch.engine import TorchEngine
from megatron_tf.optimizers.muon import MUON as MUON_RULE
from megatron_tf.study import probe as probing
from megatron_tf.study.hours import speed_key
from megatron_tf.study.plan import make_plan
from megatron_tf.study.probe import probe

MUON = {"optimizer": {"type": "muon"}, "training": {"global_batch_size": 8, "micro_batch_size": 2}}


@pytest.fixture
def nodes(study):
    muon = {"name": "muon", "tokens": 20 * 64, "decay": 0.2, "overrides": MUON}
    of = study(arms={"small": {"sweep": None}}, common={"training": {"micro_batch_size": 2}}, more=[muon])
    return {node.arm.name: node for node in make_plan(of).nodes if node.seed == 1}


def test_models_are_timed_in_turns(nodes, monkeypatch):
    order = []
    times = {"small": iter([1.0, 9.0, 2.0]), "grown": iter([4.0, 4.0, 40.0])}
    tokens = nodes["small"].config.model.parameter_tokens

    def took(config, steps):
        name = "small" if config.model.parameter_tokens == tokens else "grown"
        order.append(name)
        return next(times[name])

    monkeypatch.setattr(probing, "_step_seconds", took)
    speeds = probe([nodes["small"], nodes["going_on"], nodes["grown"]], ranks=2, threads=1)
    assert order == ["small", "grown", "grown", "small", "small", "grown"]
    assert speeds.tokens_per_second(nodes["going_on"]) == 64 / 2.0
    assert speeds.tokens_per_second(nodes["grown"]) == 64 / 4.0


def test_what_is_timed_is_a_rank_of_the_run_with_its_optimizer(nodes, monkeypatch):
    """Two of four micro batches, for a run of two data-parallel ranks."""
    steps = []
    step = TorchEngine.train_step

    def kept(engine, number, batches):
        steps.append((number, engine.optimizer.rule, engine.plan.num_micro_batches, torch.get_num_threads()))
        return step(engine, number, batches)

    monkeypatch.setattr(TorchEngine, "train_step", kept)
    speeds = probe([nodes["small"], nodes["muon"]], ranks=2, threads=3, rounds=1, steps=2)
    assert [each for each in steps if each[1] is MUON_RULE] == [(number, MUON_RULE, 2, 3) for number in range(3)]
    assert len(steps) == 6 and len({speed_key(node) for node in nodes.values()}) == 3
    assert all(speeds.tokens_per_second(nodes[name]) > 0 for name in ("small", "muon", "going_on"))
    assert speeds.tokens_per_second(nodes["grown"]) is None and not dist.is_initialized()


def test_a_long_turn_ends_after_a_step(nodes, monkeypatch):
    monkeypatch.setattr(probing, "TURN_SECONDS", 0.0)
    counted = []
    step = TorchEngine.train_step
    monkeypatch.setattr(TorchEngine, "train_step", lambda *given: counted.append(0) or step(*given))
    assert probe([nodes["small"]], ranks=1, threads=1, rounds=2).tokens_per_second(nodes["small"]) > 0
    assert len(counted) == 2 * 2
