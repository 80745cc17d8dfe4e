"""The engine on torch alone: every layout computes what one process computes, and deepspeed is not needed for it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from launching import PROJECT, TRAIN, free_port, run
from layout_checks import BOUNDARIES, check_layouts
from prepared import write_tokens
from tiny import run_config

from megatron_tf.config.run_plan import plan_batches
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.engine.choice import build_engine
from megatron_tf.engine.torch import sharding
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.parallel.groups import SINGLE, make_group
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.sources import InitialSource, initial_source
from megatron_tf.tasks.layers import example_batches
from megatron_tf.verification.layout import Layout, joined, reference

# five tokens over four data-parallel ranks leave the last one none
FEW_TOKENS = {"parameter_tokens": {"qkv": 5, "proj": 11, "ffn": 37}}


def config(**changes):
    parallel = {"engine": "torch", **changes.pop("parallel", {})}
    return run_config(parallel=parallel, **changes)


def test_two_ranks():
    layouts = [Layout(Topology(2, 1, 1), True), Layout(Topology(1, 2, 1)), Layout(Topology(1, 1, 2))]
    check_layouts(config(data=BOUNDARIES), *layouts)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["optimizer", "gradients", "parameters"])
def test_four_ranks(shard):
    layouts = [
        Layout(Topology(1, 1, 4)),
        Layout(Topology(2, 1, 2), True),
        Layout(Topology(1, 2, 2)),
        Layout(Topology(2, 2, 1), True),
    ]
    check_layouts(config(parallel={"shard": shard}, model=FEW_TOKENS, training={"micro_batch_size": 1}), *layouts)


@pytest.mark.slow
def test_other_order_depth_and_recomputation():
    changes = {"data": BOUNDARIES, "model": {"num_layers": 3}, "training": {"activation_checkpointing": True}}
    check_layouts(config(parallel={"schedule": "gpipe"}, **changes), Layout(Topology(1, 3, 1)))


@pytest.mark.slow
def test_the_gram_form_over_micro_batches():
    """Its matrices are made once a step, of blocks that are recomputed and whose parameters are gathered each time."""
    training = {"norm": "gram", "activation_checkpointing": True, "micro_batch_size": 1}
    layouts = [Layout(Topology(2, 1, 2), True), Layout(Topology(2, 2, 1))]
    check_layouts(config(parallel={"shard": "parameters"}, training=training), *layouts)


@pytest.mark.slow
def test_a_transformer_and_sparse_tokens():
    plain = {"architecture": "transformer", "parameter_tokens": None, "ffn_hidden_size": 37}
    check_layouts(config(model=plain), Layout(Topology(2, 1, 2), True), Layout(Topology(1, 2, 2)))
    bank = {"group_size": 16, "candidates": 4, "dense": 0}
    sparse = {"parameter_tokens": {"qkv": 13, "proj": 11, "ffn": 64}, "sparse": {"ffn": bank}}
    check_layouts(config(model=sparse), Layout(Topology(2, 1, 2)), Layout(Topology(1, 2, 1)))


@pytest.mark.parametrize(("precision", "world"), [("bf16", 2), pytest.param("fp32", 4, marks=pytest.mark.slow)])
def test_stages_of_sharded_parameters_evaluate_as_one_process(precision, world, tmp_path):
    """Hidden states arrive in the compute type, in which sharded parameters are not."""
    of = config(parallel={"pipeline": 2}, training={"precision": precision, "micro_batch_size": 1})
    expected = reference(of, 1).losses[0]
    start_ranks(_evaluation, world, of, world, expected, 1e-5 if precision == "fp32" else 1e-2, str(tmp_path))


def _evaluation(rank, of, world, expected, tolerance, folder):
    topology, plan = Topology(1, 2, world // 2), plan_batches(of, world)
    with joined([of], rank, world, folder):
        tensor = make_group(topology, "tensor", 60.0)
        engine = build_engine(of, of.model, plan, topology, tensor, initial_source(of))
        own = example_batches(of, plan, 0, topology.coordinate("data", rank), topology.data)
        groups = [0] * (plan.num_micro_batches * plan.micro_batch_size)
        assert engine.evaluate_groups(own, groups, 1).loss == pytest.approx(expected, rel=tolerance)
        engine.close()


def test_a_gradient_that_is_not_finite_and_a_drifted_copy(tmp_path):
    start_ranks(_faults, 2, str(tmp_path))


def _faults(rank, folder):
    of = config()
    plan, topology = plan_batches(of, 2), Topology(1, 2, 1)
    of = of.model_copy(update={"parallel": of.parallel.model_copy(update={"pipeline": 2})})
    with joined([of], rank, 2, folder):
        plan = plan_batches(of, 2)
        tensor = make_group(topology, "tensor", 60.0)
        engine = build_engine(of, of.model, plan, topology, tensor, InitialSource(of.model, 7))
        before = [piece.tensor.clone() for piece in engine.pieces()]
        engine.check_replicas()
        weights = dict(engine.stage().named_parameters())
        if rank == 1:
            handle = weights["final_norm.weight"].register_hook(lambda gradient: gradient * torch.inf)
        result = engine.train_step(0, example_batches(of, plan, 0, 0, 1))
        assert result.skipped and engine.steps_skipped == 1
        assert engine.nonfinite_gradients() == ["final_norm.weight"]
        assert all(torch.equal(a, piece.tensor) for a, piece in zip(before, engine.pieces()))
        if rank == 1:
            handle.remove()
        assert not engine.train_step(1, example_batches(of, plan, 1, 0, 1)).skipped
        engine.check_replicas()
        if rank == 1:
            with torch.no_grad():
                weights["embedding.weight"][0, 0] += 1
        with pytest.raises(CheckpointError, match=r"embedding.weight from row 0: ranks \[0\] differ from ranks \[1\]"):
            engine.check_replicas()
        engine.close()


def test_a_small_stage_travels_in_one_piece_and_trains_as_block_by_block(tmp_path):
    start_ranks(_pieces, 2, str(tmp_path))


def _pieces(rank, folder):
    of = config(model=FEW_TOKENS, training={"micro_batch_size": 1})
    plan, topology, trained = plan_batches(of, 2), Topology(data=2), []
    with joined([of], rank, 2, folder):
        for small in (sharding.SMALL, 0):
            sharding.SMALL = small
            engine = build_engine(of, of.model, plan, topology, SINGLE, InitialSource(of.model, 7))
            blocks = engine.stage().blocks.values()
            assert [hasattr(block, "unshard") for block in blocks] == [small == 0] * len(blocks)
            results = [engine.train_step(step, example_batches(of, plan, step, rank, 2)) for step in range(2)]
            state = {(piece.name, piece.state): piece.tensor.clone() for piece in engine.pieces()}
            trained.append(([(result.loss, result.grad_norm) for result in results], state))
            engine.close()
    (losses, state), (others, other_state) = trained
    assert losses == others and plan.num_micro_batches > 1
    assert state.keys() == other_state.keys()
    assert all(torch.equal(tensor, other_state[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"parallel": {"engine": "deepspeed", "shard": "parameters"}},
            "parallel.shard: parameters needs parallel.engine",
        ),
        (
            {"training": {"precision": "fp16"}, "deepspeed": {"zero_optimization": {"overlap_comm": True}}},
            "deepspeed: this section has no effect with parallel.engine: torch, but for deepspeed.fp16",
        ),
        ({"zero": {"stage": 0}}, "zero.stage: 0 is for parallel.engine: deepspeed"),
        ({"deepspeed": {"fp16": {"loss_scale_window": 10}}}, "deepspeed: this section has no effect"),
        (
            {"parallel": {"pipeline": 2}, "training": {"micro_batch_size": 8}},
            "parallel.schedule: 1f1b needs a micro batch for each of parallel.pipeline 2 stages, and a step has 1 of "
            "them. Set it to gpipe, or training.micro_batch_size to 1, 2 or 4, or training.global_batch_size to",
        ),
    ],
)
def test_what_an_engine_does_not_have(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(config(**changes), 2)


def test_a_start_does_not_import_the_compiler_of_torch():
    """It takes longer than torch itself, and torch imports it for trifles."""
    script = (
        "import sys, torch; sys.path.insert(0, 'tests'); from tiny import run_config\n"
        "from megatron_tf.engine.optimizer import SegmentedOptimizer; from megatron_tf.model import build_model\n"
        "sparse = {'sparse': {'ffn': {'group_size': 16, 'candidates': 2, 'dense': 5}}}\n"
        "config = run_config(model=sparse); build_model(config.model, device='meta'); build_model(config.model)\n"
        "SegmentedOptimizer([torch.zeros(2)], config.optimizer)\n"
        "sys.exit(any(name in sys.modules for name in ('torch._dynamo', 'sympy')))"
    )
    assert run(["python", "-c", script], fresh=True).returncode == 0


@pytest.fixture
def folder(tmp_path):
    write_tokens(tmp_path / "data")
    model = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16, "vocab_size": 99}
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {**model, "parameter_tokens": {"qkv": 13, "proj": 11, "ffn": 37}},
        "parallel": {"engine": "torch"},
        "training": {"train_steps": 4, "global_batch_size": 8, "micro_batch_size": 2, "precision": "bf16"},
        "optimizer": {"lr": 1e-3, "schedule": {"type": "constant"}},
        "data": {"train": [{"path": str(tmp_path / "data")}]},
        "logging": {"interval_steps": 1, "health_interval_steps": 2},
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(values))
    return tmp_path


# Starts of launch/train.py one after the other, each of so many ranks, forked from a process that has imported torch.
WITHOUT_DEEPSPEED = """
import json, multiprocessing, os, runpy, sys
sys.modules["deepspeed"] = None
import torch._dynamo, megatron_tf.engine.torch.engine, megatron_tf.training.run

def rank(number, world, port, words):
    if world > 1:
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")

fork = multiprocessing.get_context("fork")
for world, port, words in json.loads(sys.argv[1]):
    ranks = [fork.Process(target=rank, args=(number, world, port, words)) for number in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        sys.exit(1)
"""


@pytest.mark.slow
def test_training_without_deepspeed(folder):
    """bf16 on one process, resumed with sharded parameters on two, then grown and with samples split over them."""
    grown = [f"run.dir={folder}/grown", f"growth.from={folder}/run", "model.parameter_tokens.ffn=80"]
    grown += ["parallel.context=2", f"data.validation=[{{path: {folder}/data}}]", "evaluation.interval_steps=4"]
    starts = [(1, []), (2, ["training.train_steps=8", "parallel.shard=parameters"]), (2, grown)]
    starts = [(ranks, free_port(), [TRAIN, f"{folder}/config.yml", *overrides]) for ranks, overrides in starts]
    done = run(["python", "-c", WITHOUT_DEEPSPEED, json.dumps(starts)], fresh=True, PYTHONPATH=str(PROJECT))
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout
    assert "2 ranks as TP1×PP1×DP2, torch, sharded parameters, bf16" in done.stdout
    losses = [
        json.loads(line).get("train/loss") for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len([loss for loss in losses if loss is not None]) == 8
    assert "growth: held batch" in done.stdout and "2 ranks as TP1×PP1×DP1×CP2" in done.stdout, done.stdout
    values = [json.loads(line) for line in (folder / "grown" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/loss" in line for line in values) and any("health/ffn/dead_share" in line for line in values)
