"""optimizer.lr_rule and layer_decay: the factors, the updates that follow, the same at every layout and engine."""

from __future__ import annotations

import math

import pytest
import torch
from images import image_config
from pydantic import ValidationError
from study_names import problems_of
from tiny import run_config

from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.costs.plan import describe
from megatron_tf.engine.optimizer import Segment, SegmentedOptimizer
from megatron_tf.state.lr_rule import Factors, factors
from megatron_tf.state.parameters import parameter_table
from megatron_tf.state.sources import InitialSource, initial_source
from megatron_tf.verification.layout import Layout, compare, reference, run_layouts

BASE = {"qkv": 26, "proj": 11, "ffn": 148}  # twice, once and four times the tokens of the tiny model


def config(rule=None, engine="deepspeed", **changes):
    optimizer = {"lr": 1e-3, "weight_decay": 0.1, "lr_rule": {"base_tokens": BASE, **(rule or {})}}
    changes["optimizer"] = {**optimizer, **changes.get("optimizer", {})}
    return run_config(parallel={"engine": engine}, **changes)


def factors_of(config):
    return factors(config.model, config.optimizer)


def test_the_factors_by_hand():
    found = factors_of(config({"scale_initial_values": True}))
    assert found["blocks.1.attention.query.key_tokens"] == Factors(lr=2**0.5)
    assert found["blocks.0.attention.value.value_tokens"] == Factors(2.0, 0.5, 2**0.5)
    assert found["blocks.0.attention.proj.key_tokens"] == Factors()
    assert found["blocks.0.ffn.key_tokens"] == Factors(lr=2.0)
    assert found["blocks.0.ffn.value_tokens"] == Factors(4.0, 0.25, 2.0)
    assert len(found) == 2 * 5 * 2 and all(name.startswith("blocks.") for name in found)
    others = factors_of(config({"key_power": 1.0, "value_power": 0.0}))
    assert others["blocks.0.ffn.key_tokens"].lr == 4 and others["blocks.0.ffn.value_tokens"] == Factors()


@pytest.mark.parametrize("key", ["key_power", "value_power"])
def test_powers_that_floating_point_cannot_hold_are_refused(key):
    assert config({key: 2.0})
    with pytest.raises(ValidationError, match="less than or equal to 2"):
        config({key: 1000.0})


def test_layers_by_hand():
    """Blocks, ends and the rule together; of images too."""
    found = factors_of(config(optimizer={"layer_decay": 0.5}))
    assert found["blocks.1.ffn.value_tokens"] == Factors(0.5 * 4.0, 0.25)
    assert found["blocks.0.ffn.key_tokens"] == Factors(0.25 * 2.0)
    assert found["embedding.weight"] == Factors(0.125) and found["final_norm.weight"] == Factors()
    images = image_config(optimizer={"lr": 1e-3, "layer_decay": 0.5})
    found = factors_of(images)
    assert {found[f"patches.{name}"].lr for name in ("weight", "bias", "positions")} == {0.125}
    assert {found[name] for name in ("head.weight", "head.bias", "final_norm.bias")} == {Factors()}
    assert found.keys() == parameter_table(images.model).keys()
    assert "rates   × optimizer.lr: layers 0.25 to 0.5" in describe(images, 1)


def test_after_a_growth_the_new_count_is_what_counts():
    grown = config(model={"parameter_tokens": {"qkv": 52, "proj": 44, "ffn": 592}})
    found = factors_of(grown)
    assert found["blocks.0.ffn.value_tokens"] == Factors(0.25, 4.0) and found["blocks.0.ffn.key_tokens"].lr == 0.5
    assert found["blocks.0.attention.proj.value_tokens"] == Factors(0.25, 4.0)
    assert "rates   × optimizer.lr: qkv 0.707 keys, 0.5 values; proj 0.5 keys, 0.25 values; ffn 0.5 keys" in describe(
        grown, 1
    )


def test_of_candidates_those_count_that_a_position_uses():
    """And what chooses among them is no token."""
    sparse = {"ffn": {"group_size": 16, "candidates": 3, "dense": 5}}
    found = factors_of(config(model={"sparse": sparse}))
    for part in ("", "bank."):
        assert found[f"blocks.0.ffn.{part}key_tokens"].lr == 2.0
        assert found[f"blocks.0.ffn.{part}value_tokens"] == Factors(4.0, 0.25)
    assert not [name for name in found if "router" in name or "balance" in name]


def test_candidates_learn_at_a_rate_of_their_own():
    """All that a bank has, and no token that every position uses. With a rule as well."""
    sparse = {"ffn": {"group_size": 16, "candidates": 4, "dense": 5}}
    slow = {"candidate_lr_factor": 0.5}
    own = run_config(model={"sparse": sparse}, optimizer={"lr": 1e-3, **slow})
    bank = ("key_tokens", "value_tokens", "router", "balance")
    names = {f"blocks.{layer}.ffn.bank.{name}" for layer in (0, 1) for name in bank}
    assert factors_of(own) == {name: Factors(lr=0.5) for name in names}
    assert "rates   × optimizer.lr: candidates 0.5" in describe(own, 1)
    without = describe(run_config(optimizer={"lr": 1e-3, **slow}), 1)
    assert "rates   × optimizer.lr: candidate_lr_factor 0.5 has no effect, the model has no candidates\n" in without
    both = factors_of(config(model={"sparse": sparse}, optimizer=slow))
    assert both["blocks.0.ffn.bank.value_tokens"] == Factors(2.0, 0.25) and both["blocks.0.ffn.key_tokens"].lr == 2.0
    assert not factors_of(run_config(optimizer={"lr": 1e-3, **slow}))


def test_candidates_have_the_factor_of_the_optimizer():
    """Unless one is given. Of a model without candidates nothing is said."""
    sparse = {"ffn": {"group_size": 16, "candidates": 4}}
    muon = {"type": "muon", "lr": 1e-2}
    own = run_config(model={"sparse": sparse}, optimizer=muon)
    found = {name.removeprefix("blocks.0.ffn.bank."): own.lr for name, own in factors_of(own).items() if ".0." in name}
    tokens, choice = pytest.approx(0.6), pytest.approx(0.06)
    assert found == {"key_tokens": tokens, "value_tokens": tokens, "router": choice, "balance": choice}
    assert "rates   × optimizer.lr: candidates 0.6; their routers 0.06\n" in describe(own, 1)
    ones = {"candidate_lr_factor": 1, "router_lr_factor": 1}
    given = run_config(model={"sparse": sparse}, optimizer={**muon, **ones})
    assert factors_of(given) == {} and "rates" not in describe(given, 1)
    told = describe(run_config(optimizer={"lr": 1e-3, "router_lr_factor": 0.5}), 1)
    assert "rates   × optimizer.lr: router_lr_factor 0.5 has no effect, the model has no candidates\n" in told
    assert factors_of(run_config(model={"sparse": sparse})) == {}
    assert "rates" not in describe(run_config(optimizer=muon), 1)


def test_initial_values_may_be_scaled():
    scaled, plain = initial_source(config({"scale_initial_values": True})), InitialSource(config().model, 7)
    unscaled = initial_source(config())
    for name, factor in {"ffn.value_tokens": 2.0, "ffn.key_tokens": 1.0, "attention.proj.value_tokens": 1.0}.items():
        own, other, without = (
            source.read(f"blocks.1.{name}", "weight", 40, 90) for source in (scaled, plain, unscaled)
        )
        assert torch.equal(own, factor * other) and torch.equal(without, other)


def test_updates_by_hand():
    """The first update of Adam is its rate; weight decay takes rate × decay of the weight; nothing moves what is
    frozen."""
    flat = torch.ones(8).requires_grad_()
    adam = SegmentedOptimizer([flat], Optimizer(lr=1e-2, weight_decay=0.5, eps=1e-12))
    rates = {"plain": (1.0, 1.0), "key": (0.5, 1.0), "value": (0.25, 4.0), "frozen": (0.0, 4.0)}
    adam.bind(
        Segment(name, 0, 2, flat, 2 * number, True, True, torch.tensor(0.0), lr, decay)
        for number, (name, (lr, decay)) in enumerate(rates.items())
    )
    flat.grad = torch.full((8,), -3.0)
    adam.step()
    expected = [1 - 1e-2 * lr * 0.5 * decay + 1e-2 * lr for lr, decay in rates.values()]
    assert flat.detach().view(4, 2).mean(1).tolist() == pytest.approx(expected, rel=1e-6)
    assert flat[6:].tolist() == [1.0, 1.0]


def check(config, *chosen, steps=6):
    """Every layout gives the losses of one process, which are others than those without the rule."""
    expected = reference(config, steps)
    without = config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr_rule": None})})
    assert abs(reference(without, steps).losses[-1] / expected.losses[-1] - 1) > 1e-4
    for layout, trace in zip(chosen, run_layouts(config, chosen, steps)):
        difference = compare(trace, expected)
        assert difference.agrees(1e-5), f"{layout}: {difference}"


RULE = {"scale_initial_values": True}
DECAY = {"layer_decay": 0.6}


def test_two_ranks_with_deepspeed():
    check(
        config(RULE, optimizer=DECAY), Layout(Topology(2, 1, 1)), Layout(Topology(1, 2, 1)), Layout(Topology(1, 1, 2))
    )


@pytest.mark.slow
def test_two_ranks_with_torch():
    check(config(RULE, "torch", optimizer=DECAY), Layout(Topology(2, 1, 1), True), Layout(Topology(1, 1, 2)))
    check(config(RULE, "torch", optimizer={"type": "muon", **DECAY}), Layout(Topology(2, 1, 1)))


def test_a_transformer_has_no_use_for_it():
    plain = config(
        model={"architecture": "transformer", "parameter_tokens": None, "ffn_hidden_size": 37},
        optimizer={"candidate_lr_factor": 0.5},
    )
    found = problems_of(lambda: validate(plain, 1))
    assert found == [
        "optimizer.lr_rule: is given, but a transformer has no parameter tokens. Set it to null, and tune optimizer.lr "
        "for each size.",
        "optimizer.candidate_lr_factor: is 0.5, but a transformer has no candidates. Set it to null.",
    ]
    assert factors_of(plain) == {} and math.isclose(factors_of(config())["blocks.0.ffn.key_tokens"].lr, 2.0)
