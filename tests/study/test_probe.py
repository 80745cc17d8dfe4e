from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_tf.engine.step_clock import StepClock
from megatron_tf.engine.torch.engine import TorchEngine
from megatron_tf.errors import UserError
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
    assert speeds.tokens_per_second(nodes["going_on"]) == 2 * 64 / 2.0
    assert speeds.tokens_per_second(nodes["grown"]) == 2 * 64 / 4.0


def test_a_step_is_passes_of_all_micro_batches_and_an_update_by_the_runs_optimizer(nodes, monkeypatch):
    """Of a clock that takes 3 seconds for a step, one of them for the update."""
    steps = []
    step = TorchEngine.train_step

    def kept(engine, number, batches):
        steps.append((engine.optimizer.rule, engine.plan.num_micro_batches, torch.get_num_threads()))
        return step(engine, number, batches)

    monkeypatch.setattr(TorchEngine, "train_step", kept)
    monkeypatch.setattr(StepClock, "shares", lambda clock: {"optimizer": 1 / 3})
    monkeypatch.setattr(probing, "time", SimpleNamespace(perf_counter=itertools.count(0, 3).__next__))
    monkeypatch.setattr(probing, "TURN_SECONDS", 100.0)
    before = torch.get_num_threads()
    speeds = probe([nodes["small"], nodes["muon"]], ranks=2, threads=3, rounds=1, steps=2)
    assert [each for each in steps if each[0] is MUON_RULE] == [(MUON_RULE, 1, 3)] * 3
    assert speeds.tokens_per_second(nodes["muon"]) == pytest.approx(2 * 8 * 16 / (4 * 2 + 1))
    assert speeds.tokens_per_second(nodes["going_on"]) == pytest.approx(2 * 4 * 16 / (2 * 2 + 1))
    assert speeds.tokens_per_second(nodes["grown"]) is None
    assert not dist.is_initialized() and torch.get_num_threads() == before


def test_speeds_differ_by_how_a_run_trains(study):
    slow = {
        "name": "slow",
        "tokens": 20 * 64,
        "decay": 0.2,
        "overrides": {"training": {"activation_checkpointing": True}},
    }
    nodes = make_plan(study(arms={"small": {"sweep": None}}, more=[slow])).nodes
    assert len({speed_key(node) for node in nodes if node.arm.name in ("small", "going_on", "slow")}) == 2


def test_of_fp16_steps_that_find_the_scale_do_not_count(study):
    half = {"training": {"precision": "fp16"}}
    (node, *_) = make_plan(study(arms={"small": {"sweep": None}}, common=half)).nodes
    skipped = []
    step = TorchEngine.train_step

    def kept(engine, number, batches):
        result = step(engine, number, batches)
        skipped.append((number, result.skipped))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "train_step", kept)
        assert probe([node], ranks=1, threads=1, rounds=1, steps=2).tokens_per_second(node) > 0
    assert skipped[-3:] == [(0, False), (1, False), (2, False)]


def test_a_model_that_does_not_fit_is_said(nodes, monkeypatch):
    def full(config, steps):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(probing, "_step_seconds", full)
    with pytest.raises(UserError, match="does not fit on one device.*--flops-per-second"):
        probe([nodes["small"]], ranks=1, threads=1)
    assert not dist.is_initialized()
    assert probe([], ranks=1, threads=1).tokens_per_second(nodes["small"]) is None


def test_a_long_turn_ends_after_a_step(nodes, monkeypatch):
    monkeypatch.setattr(probing, "TURN_SECONDS", 0.0)
    counted = []
    step = TorchEngine.train_step
    monkeypatch.setattr(TorchEngine, "train_step", lambda *given: counted.append(0) or step(*given))
    assert probe([nodes["small"]], ranks=1, threads=1, rounds=2).tokens_per_second(nodes["small"]) > 0
    assert len(counted) == 2 * 2
