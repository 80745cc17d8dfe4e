from __future__ import annotations

import pytest
import torch
from distributed import spawn
from tiny import run_config
from torch.nn.functional import gelu, one_hot

from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.step_zero import write_step_zero
from megatron_tf.config.topology import Topology
from megatron_tf.inference.load import load_model
from megatron_tf.inference.sharded import load_stage
from megatron_tf.model import build_model
from megatron_tf.model.layers import TensorParallel
from megatron_tf.model.observing import observed
from megatron_tf.model.stage import build_stage
from megatron_tf.parallel.groups import make_group
from megatron_tf.pruning.measure import visit_projections
from megatron_tf.state.parameters import initial_scales, parameter_table, projections, shard_range
from megatron_tf.state.sources import InitialSource, StepZero
from megatron_tf.training.health import DEAD_BELOW, HealthProbe, in_words

OLD = {"qkv": 13, "proj": 7, "ffn": 20}  # of 13, 11 and 37: qkv has not grown
LAYOUTS = {
    1: [(Topology(), False)],
    2: [
        (Topology(tensor=2), True),
        (Topology(pipeline=2), False),
        (Topology(data=2), False),
        (Topology(context=2), False),
    ],
    4: [(Topology(2, 2, 1), True), (Topology(2, 1, 2), False)],
}


@pytest.fixture
def checkpoint(config, tmp_path):
    """Initial weights, in which one old token and one new token of the first ffn are dead."""
    model = config().model
    start = StepZero(Deadened(InitialSource(model, 3), model.hidden_size), 0, 0, ())
    return write_step_zero(tmp_path / "checkpoints", model, start, {}, lambda done, text: None)


class Deadened:
    def __init__(self, source, width):
        self.source, self.scales, self.adam_steps, self._width = source, source.scales, source.adam_steps, width

    def read(self, name, state, start, stop):
        values = self.source.read(name, state, start, stop)
        if name == "blocks.0.ffn.key_tokens":
            rows = torch.arange(start, stop) // self._width
            values[(rows == 5) | (rows == 30)] = 0
        return values

    def read_into(self, name, state, start, target):
        target.copy_(self.read(name, state, start, start + target.numel()))


def ids():
    return torch.randint(0, 99, (3, 16), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def reference(model):
    """Token by token and position by position, from the formulas in words."""
    found, inputs, specs = {}, [], projections(model.config)
    visit_projections(model, ids(), specs, lambda *seen: inputs.append(seen))
    for name, projection, x in inputs:
        kind = specs[name].kind
        scores = x @ projection.key_tokens.T
        norm = scores.square().sum(-1, keepdim=True).sqrt()
        size = gelu(projection.scale * scores / norm).abs()
        tokens, old = size.shape[1], OLD[kind]
        rms = size.square().mean(-1, keepdim=True).sqrt()
        dead = (size < DEAD_BELOW * rms).all(0)
        contribution = size.sum(0) * projection.value_tokens.norm(dim=1)
        metrics = {
            "score_norm": norm.mean(),
            "active_share": (size.sum(-1) ** 2 / (tokens * size.square().sum(-1))).mean(),
            "dead_share": dead.float().mean(),
            "new_share": contribution[old:].sum() / contribution.sum(),
            "old_dead_share": dead[:old].float().mean(),
            "new_dead_share": dead[old:].float().mean(),
        }
        for metric, value in metrics.items():
            if kind != "qkv" or metric in ("score_norm", "active_share", "dead_share"):
                found.setdefault(f"health/{kind}/{metric}", []).append(float(value))
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_the_dead_are_found(checkpoint):
    found = reference(load_model(checkpoint, torch.float64))
    assert found["health/ffn/old_dead_share"] == pytest.approx(0.5 * 1 / 20)  # one of two layers
    assert found["health/ffn/new_dead_share"] == pytest.approx(0.5 * 1 / 17)
    assert 0.1 < found["health/ffn/new_share"] < 0.9 and 1 / 37 < found["health/ffn/active_share"] < 1


def test_in_words():
    found = {"qkv/score_norm": 3.2, "qkv/active_share": 0.418, "qkv/dead_share": 0.0312, "ffn/load_max": 2.571,
             "ffn/load_spread": 0.8, "ffn/unused_share": 0.04, "ffn/copy_distance": 0.316}  # fmt: skip
    assert in_words({f"health/{name}": value for name, value in found.items()}) == [
        "health of qkv: 42% of the tokens active, 3% dead",
        "health of ffn: fullest candidate 2.57 × an equal share, 4% of the candidates unused, copies 0.32 apart",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_equal_at_every_layout(checkpoint, config, ranks):
    spawn(_layouts, ranks, str(checkpoint), config().model, reference(load_model(checkpoint, torch.float64)))


def _layouts(group, checkpoint, model, expected):
    for topology, sequence in LAYOUTS[group.size]:
        context = make_group(topology, "context", 60.0)
        tensor = TensorParallel(make_group(topology, "tensor", 60.0), sequence, context)
        stage = load_stage(open_checkpoint(checkpoint), model, topology, group.rank, tensor, torch.float64)
        is_reporter = tensor.group.rank == 0 and topology.coordinate("replicas", group.rank) == 0
        probe = HealthProbe(stage, ids(), tuple(projections(model).values()), OLD, is_reporter)
        found = probe.measure()
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-5), (name, topology)  # the probe's own sums are fp32
        assert probe.measure() == found
        assert all(block.ffn.observer is None for block in stage.blocks.values())


OLD_OF_BANK = {"ffn": 5}  # of 69: the bank is new


@torch.no_grad()
def reference_of_candidates(model):
    """Of the ffn, from the scores of all tokens, of which a mask takes those that a position does not use."""
    inputs, found = [], {}
    with observed((block.ffn, inputs.append) for block in model.blocks):
        model(ids())
    for block, x in zip(model.blocks, inputs):
        ffn, rows = block.ffn, x.flatten(0, -2)
        keys, values = (
            torch.cat([getattr(ffn, name), getattr(ffn.bank, name)]) for name in ("key_tokens", "value_tokens")
        )
        chosen = ffn.choose(ffn.bank.logits(rows), ffn.bank.slot_balance())
        of_bank = one_hot(chosen, 3).repeat_interleave(16, -1).flatten(1)
        used = torch.cat([torch.ones(len(rows), 5), of_bank], 1).bool()
        scores = torch.where(used, rows @ keys.T, 0.0)
        norm = scores.square().sum(-1, keepdim=True).sqrt()
        size = gelu(ffn.scale * scores / norm).abs()
        dead = (size < DEAD_BELOW * (size.square().sum(-1, keepdim=True) / 69).sqrt()).all(0)
        contribution = size.sum(0) * values.norm(dim=1)
        metrics = {
            "score_norm": norm.mean(),
            "active_share": (size.sum(-1) ** 2 / (69 * size.square().sum(-1))).mean(),
            "dead_share": dead.double().mean(),
            "new_share": contribution[5:].sum() / contribution.sum(),
            "old_dead_share": dead[:5].double().mean(),
            "new_dead_share": dead[5:].double().mean(),
        }
        for name, value in metrics.items():
            found[name] = found.get(name, 0.0) + float(value) / 2
    return found


def candidates_over(group):
    """One process and two tensor ranks measure the same of a bank; copies have distance 0."""
    bank = {"group_size": 16, "candidates": 3, "dense": 5}
    model = run_config(
        model={"parameter_tokens": {"qkv": 13, "proj": 11, "ffn": 69}, "sparse": {"ffn": bank}}
    ).model  # fmt: skip
    table, one = parameter_table(model), build_model(model, dtype=torch.float64)
    with torch.no_grad():
        for tokens in (one.blocks[0].ffn.bank.key_tokens, one.blocks[0].ffn.bank.value_tokens):
            by_slot = tokens.view(4, 3, 16, 32)
            by_slot.copy_(by_slot[:, :1].clone().expand_as(by_slot))
        one.blocks[1].ffn.bank.balance.view(4, 3)[:, 0] = 100.0
        one.blocks[0].ffn.bank.router.mul_(0)
    whole = dict(one.named_parameters())
    found = []
    for topology in (Topology(data=2), Topology(tensor=2), Topology(context=2)):
        context = make_group(topology, "context", 60.0)
        tensor = TensorParallel(make_group(topology, "tensor", 60.0), context=context)
        stage = build_stage(model, initial_scales(model), topology, group.rank, tensor).double()
        with torch.no_grad():
            for name, parameter in stage.named_parameters():
                rows = shard_range(len(whole[name]), tensor.group.size, tensor.group.rank)
                parameter.copy_(whole[name][slice(*rows)] if table[name].sharded else whole[name])
        is_reporter = tensor.group.rank == 0 and topology.coordinate("replicas", group.rank) == 0
        found.append(HealthProbe(stage, ids(), tuple(projections(model).values()), OLD_OF_BANK, is_reporter).measure())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)
    ffn = {name.removeprefix("health/ffn/"): value for name, value in found[0].items() if "/ffn/" in name}
    expected = reference_of_candidates(one)
    assert {name: ffn.pop(name) for name in expected} == pytest.approx(expected, rel=1e-5)
    assert 2 / 3 * 192 / 197 <= expected["dead_share"] < 0.8 and 0.5 < expected["new_share"] < 1
    assert ffn.keys() == {"load_max", "load_spread", "unused_share", "copy_distance"}
    # both layers send all positions to the first of three candidates, and one has copies
    assert ffn["load_max"] == pytest.approx(3) and ffn["unused_share"] == pytest.approx(2 / 3)
    assert ffn["load_spread"] == pytest.approx(1 / 3)
    assert 0.35 < ffn["copy_distance"] < 0.45


def test_candidates_are_measured_alike_over_tensor_ranks():
    spawn(candidates_over, 2)
