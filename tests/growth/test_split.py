"""Splitting keeps the function for any router, and gives each copy the state of what it is a copy of."""

from __future__ import annotations

import pytest
import torch
from tiny import run_config
from torch import Tensor

from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import ConfigError
from megatron_tf.growth.rules import chain_problems, growth_problems, scales_after_growth
from megatron_tf.growth.source import GrownSource
from megatron_tf.model import build_model
from megatron_tf.model.routing import choose
from megatron_tf.state.parameters import initial_scales, parameter_table
from megatron_tf.state.sources import InitialSource

STATES = ("weight", "exp_avg", "exp_avg_sq")
TOKENS = {"qkv": 13, "proj": 11, "ffn": 69}
BANK = {"group_size": 16, "candidates": 3, "dense": 5}
SLOTS, WIDTH = 4, 32


def model(bank: dict | None = None, **changes) -> Model:
    sparse = None if bank is None else {"ffn": bank}
    return run_config(model={"parameter_tokens": TOKENS, "sparse": sparse, **changes}).model


class Trained(InitialSource):
    """An initial state with moments, and ages by row."""

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        if state == "weight":
            return super().read(name, state, start, stop)
        return torch.arange(start, stop, dtype=torch.float32) * (1 + STATES.index(state))

    def adam_steps(self, name: str, start: int, stop: int) -> list[tuple[int, int, int]]:
        young = 21 * WIDTH if name == "blocks.0.ffn.key_tokens" else 0
        return [
            (*bounds, age)
            for *bounds, age in ((start, min(stop, young), 9), (max(start, young), stop, 4))
            if bounds[0] < bounds[1]
        ]


def split(bank: dict | None, old: Model | None = None, **growth) -> GrownSource:
    old, new = old or model(), model(bank, activation=(old or model()).activation)
    return GrownSource(
        Trained(old, 7), InitialSource(new, 7), old_model=old, new_model=new,
        growth=Growth(source="small", method="split", **growth), seed=3,
    )  # fmt: skip


def whole(source, name: str, state: str, numel: int, size: int = 10**9) -> Tensor:
    return torch.cat([source.read(name, state, low, min(low + size, numel)) for low in range(0, numel, size)])


def built(of: Model, source) -> torch.nn.Module:
    result = build_model(of, scales=source.scales, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            source.read_into(name, "weight", 0, parameter.view(-1))
    return result


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
@pytest.mark.parametrize("bank", [BANK, {"group_size": 32, "candidates": 2, "dense": 5}])
def test_the_function_stays(activation, bank):
    small = model(activation=activation)
    source = split(bank, small)
    large = model(bank, activation=activation)
    ids = torch.randint(0, 99, (3, 16), generator=torch.Generator().manual_seed(0))
    grown, before = built(large, source), built(small, Trained(small, 7))
    torch.testing.assert_close(grown(ids), before(ids), rtol=1e-12, atol=1e-12)
    assert source.preserves and source.scales == initial_scales(small)
    with torch.no_grad():
        for block in grown.blocks:
            block.ffn.bank.router.normal_()
            block.ffn.bank.balance.normal_()
    torch.testing.assert_close(grown(ids), before(ids), rtol=1e-12, atol=1e-12)


def test_attention_is_split_and_then_the_rest():
    """Every projection, the second time next to one that stays as it is."""
    tokens = {"qkv": 32, "proj": 35, "ffn": 69}
    banks = {"qkv": {"group_size": 16, "candidates": 2}, "proj": {"group_size": 16, "candidates": 3, "dense": 3}}
    models = [
        run_config(model={"parameter_tokens": tokens, "sparse": sparse}).model
        for sparse in (None, banks, {**banks, "qkv": {**banks["qkv"], "candidates": 4}, "ffn": BANK})
    ]
    ids = torch.randint(0, 99, (3, 16), generator=torch.Generator().manual_seed(0))
    source = Trained(models[0], 7)
    expected = built(models[0], source)(ids)
    for old, new in zip(models, models[1:]):
        growth = Growth(source="small", method="split")
        assert growth_problems(old, new, growth) == []
        before = source
        source = GrownSource(before, InitialSource(new, 7), old_model=old, new_model=new, growth=growth, seed=3)
        torch.testing.assert_close(built(new, source)(ids), expected, rtol=1e-12, atol=1e-12)
    growth = Growth(source="small", method="split", noise=0.1)
    source = GrownSource(before, InitialSource(new, 7), old_model=old, new_model=new, growth=growth, seed=3)
    for tensor in ("bank.key_tokens", "bank.value_tokens", "bank.router", "bank.balance"):
        name = f"blocks.0.attention.proj.{tensor}"
        numel = parameter_table(new)[name].numel
        assert torch.equal(whole(source, name, "weight", numel), whole(before, name, "weight", numel))


def test_every_copy_has_the_state_of_its_original():
    source, old = split(BANK), Trained(model(), 7)
    table = parameter_table(model(BANK))
    for state in STATES:
        for tensor in ("key_tokens", "value_tokens"):
            name = f"blocks.1.ffn.{tensor}"
            original = old.read(name, state, 0, 69 * WIDTH).view(69, WIDTH)
            copies = whole(source, name.replace("ffn.", "ffn.bank."), state, SLOTS * 3 * 16 * WIDTH)
            expected = original[5:].view(SLOTS, 1, 16, WIDTH).expand(-1, 3, -1, -1)
            assert torch.equal(copies.view(SLOTS, 3, 16, WIDTH), expected)
            assert torch.equal(whole(source, name, state, 5 * WIDTH).view(5, WIDTH), original[:5])
    # row 21 of the old tokens is where the second slot begins
    key, numel = "blocks.0.ffn.bank.key_tokens", table["blocks.0.ffn.bank.key_tokens"].numel
    first = 3 * 16 * WIDTH
    assert source.adam_steps(key, 0, numel) == [(0, first, 9), (first, numel, 4)]
    assert source.adam_steps(key, 100, 101) == [(100, 101, 9)] and source.adam_steps(key, 7, 7) == []
    for name in ("router", "balance"):
        name = f"blocks.0.ffn.bank.{name}"
        assert source.adam_steps(name, 0, table[name].numel) == [(0, table[name].numel, 0)]
        assert not whole(source, name, "exp_avg", table[name].numel).any()
    assert not whole(source, "blocks.0.ffn.bank.balance", "weight", 12).any()
    assert whole(source, "blocks.0.ffn.bank.router", "weight", 12 * WIDTH).std() > 0.01


@pytest.mark.parametrize("growth", [{}, {"noise": 0.1}, {"moments": "reset"}])
def test_ranges_do_not_matter(growth):
    source = split(BANK, **growth)
    for name, spec in parameter_table(model(BANK)).items():
        for state in STATES:
            assert torch.equal(whole(source, name, state, spec.numel), whole(source, name, state, spec.numel, 177))


def test_noise_makes_copies_differ_and_is_said():
    source = split(BANK, noise=0.1)
    rows = whole(source, "blocks.0.ffn.bank.key_tokens", "weight", SLOTS * 3 * 16 * WIDTH).view(SLOTS, 3, 16, WIDTH)
    original = Trained(model(), 7).read("blocks.0.ffn.key_tokens", "weight", 5 * WIDTH, 69 * WIDTH)
    change = rows / original.view(SLOTS, 1, 16, WIDTH) - 1
    assert 0.09 < change.std() < 0.11 and not torch.equal(rows[:, 0], rows[:, 1]) and not source.preserves


def test_moments_can_be_reset():
    source = split(BANK, moments="reset")
    assert not whole(source, "blocks.0.ffn.bank.key_tokens", "exp_avg", 100).any()
    assert source.adam_steps("blocks.0.ffn.bank.key_tokens", 0, 50) == [(0, 50, 0)]


def test_what_was_split_grows_by_slots_and_keeps_the_function():
    """zero_key appends slots of zero keys; their values and routers are random."""
    small, large = model(BANK), model(BANK, parameter_tokens={**TOKENS, "qkv": 20, "ffn": 101})
    source = GrownSource(
        InitialSource(small, 7), InitialSource(large, 7), old_model=small, new_model=large,
        growth=Growth(source="small"), seed=3,
    )  # fmt: skip
    ids = torch.randint(0, 99, (3, 16), generator=torch.Generator().manual_seed(0))
    grown, before = built(large, source), built(small, InitialSource(small, 7))
    torch.testing.assert_close(grown(ids), before(ids), rtol=1e-12, atol=1e-12)
    bank = grown.blocks[0].ffn.bank
    assert not bank.key_tokens[-96:].any() and bank.value_tokens[-96:].all() and bank.router[-6:].all()


AGAIN = {**BANK, "candidates": 6}


class Chosen(Trained):
    """Routers as large as those of a trained model, and a balance."""

    def read(self, name: str, state: str, start: int, stop: int) -> Tensor:
        values = super().read(name, state, start, stop)
        if state == "weight" and name.endswith("bank.balance"):
            return values + torch.arange(start, stop).sin() / 10
        return values * 20 if state == "weight" and name.endswith("bank.router") else values


def split_again(activation: str = "l2_norm_gelu", **growth) -> GrownSource:
    old, new = model(BANK, activation=activation), model(AGAIN, activation=activation)
    return GrownSource(
        Chosen(old, 7), InitialSource(new, 5), old_model=old, new_model=new,
        growth=Growth(source="small", method="split", **growth), seed=3,
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
def test_the_function_stays_when_candidates_are_split_again(activation):
    """Each position finds a copy of the candidate that it had, and not the same copy everywhere."""
    small, large = model(BANK, activation=activation), model(AGAIN, activation=activation)
    before, grown = built(small, Chosen(small, 7)), built(large, split_again(activation))
    chosen = {}
    for name, of in (("before", before), ("grown", grown)):
        bank = of.blocks[0].ffn
        bank.choose = lambda z, b, name=name: chosen.setdefault(name, choose(z, b))
    ids = torch.randint(0, 99, (3, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grown(ids), before(ids), rtol=1e-12, atol=1e-12)
    assert torch.equal(chosen["grown"] // 2, chosen["before"])
    assert 0.2 < (chosen["grown"] % 2).double().mean() < 0.8


def test_the_choice_among_copies_is_one_of_two_levels_for_any_router():
    """ρ_j + δ_k is largest where ρ_j is, and then δ_k, whatever both are; the first of equal ones."""
    generator = torch.Generator().manual_seed(0)
    families, among = (torch.randint(-2, 3, (999, 2, m), generator=generator).double() for m in (4, 3))
    balance = torch.randint(-1, 2, (2, 4), generator=generator).double()
    flat = (families.unsqueeze(-1) + among.unsqueeze(-2)).flatten(2)
    found = choose(flat, balance.repeat_interleave(3, 1))
    assert torch.equal(found // 3, choose(families, balance))
    assert torch.equal(found % 3, choose(among, torch.zeros(2, 3)))


def test_every_copy_of_a_candidate_has_the_state_of_its_original():
    source, old = split_again(), Chosen(model(BANK), 7)
    fresh = InitialSource(model(AGAIN), 5).read("blocks.1.ffn.bank.router", "weight", 0, SLOTS * 6 * WIDTH)
    for tensor, size in (("key_tokens", 16 * WIDTH), ("value_tokens", 16 * WIDTH), ("router", WIDTH), ("balance", 1)):
        name = f"blocks.1.ffn.bank.{tensor}"
        for state in STATES:
            original = old.read(name, state, 0, SLOTS * 3 * size).view(SLOTS, 3, 1, size)
            copies = whole(source, name, state, SLOTS * 6 * size).view(SLOTS, 3, 2, size)
            if tensor == "router" and state == "weight":
                original = original + fresh.view(SLOTS, 1, 6, WIDTH)[:, :, :2]
            assert torch.equal(copies, original.expand_as(copies))
        assert source.adam_steps(name, 0, SLOTS * 6 * size) == [(0, SLOTS * 6 * size, 4)]
    assert source.preserves and source.scales == initial_scales(model())
    assert source.record["sparse"] == {"from": {"ffn": BANK}, "to": {"ffn": AGAIN}}


@pytest.mark.parametrize("growth", [{}, {"noise": 0.1}, {"moments": "reset"}])
def test_ranges_do_not_matter_when_candidates_are_split_again(growth):
    source = split_again(**growth)
    for name, spec in parameter_table(model(AGAIN)).items():
        for state in STATES:
            assert torch.equal(whole(source, name, state, spec.numel), whole(source, name, state, spec.numel, 177))
    balance = whole(source, "blocks.0.ffn.bank.balance", "weight", 24).view(SLOTS, 3, 2)
    assert torch.equal(balance[..., 0], balance[..., 1])


def test_what_cannot_be_split_is_said_before():
    small, large = model(), model(BANK)
    assert growth_problems(small, large, Growth(source="x", method="split")) == []
    assert scales_after_growth(small, large, Growth(source="x", method="split"), {"a": 2.0}) == {"a": 2.0}
    for old, new, method, message in (
        (small, small, "split",
         "split copies tokens to candidates, and the model has none, or one a slot. Set model.sparse.ffn to "
         "{group_size: 32, candidates: 4, dense: 5}; to go on with the same model, set branch instead of growth."),
        (small, model(parameter_tokens={**TOKENS, "qkv": 20}), "split",
         "Set model.sparse.ffn to {group_size: 32, candidates: 4, dense: 5}, or growth.method to zero_key, which adds "
         "tokens or layers."),
        (small, model(BANK, parameter_tokens={**TOKENS, "qkv": 20}), "split",
         "model.parameter_tokens.qkv: 13 before, 20 after. split changes model.sparse, and no token counts"),
        (large, model({**BANK, "candidates": 8}), "split",
         "model.sparse.ffn.candidates: 3 before, 8 after. Each candidate is split into as many copies as the others: "
         "set it "
         "to a multiple of 3, such as 6 or 9."),
        (large, model({**BANK, "candidates": 2}), "split",
         "model.sparse.ffn.candidates: 3 before, 2 after. Growth cannot take candidates away: set it to 3, or prune "
         "the smaller model first: megatron_tf prune --candidates ffn=2."),
        (large, model({"group_size": 32, "candidates": 6, "dense": 5}), "split",
         "model.sparse.ffn.group_size: 16 before, 32 after. Candidates are split as they are, each into copies of its "
         "own "
         "size: set it to 16, or split the dense model that they come from."),
        (large, model({**BANK, "dense": 21, "candidates": 6}), "split", "model.sparse.ffn.dense: 5 before, 21 after."),
        (large, small, "split",
         "model.sparse.ffn: {group_size: 16, candidates: 3, dense: 5} before, null or one candidate after. Growth "
         "cannot take candidates away: "
         "set it to {group_size: 16, candidates: 3, dense: 5}, or prune the smaller model first: megatron_tf prune "
         "--candidates ffn=1."),
        (large, small, "zero_key", "null or one candidate after. Growth cannot take candidates away"),
        (large, model(BANK, parameter_tokens={**TOKENS, "qkv": 10}), "zero_key",
         "model.parameter_tokens.qkv: 13 before, 10 after. Growth cannot take tokens away: set it to 13, or prune the "
         "smaller model first: megatron_tf prune --tokens qkv=10."),
        (large, large, "split",
         "the smaller model has those of model.sparse already. Raise model.sparse.ffn.candidates, set the method to "
         "zero_key to add tokens or layers, or, to go on with the same model, set branch instead of growth."),
        (small, large, "zero_key", "model.sparse.ffn: null before, {group_size: 16, candidates: 3, dense: 5} after."),
        (small, large, "zero_key",
         "Growth by zero_key makes no candidates: set growth.method to split, which copies tokens to candidates, or to "
         "bank"),
        (large, model({**BANK, "candidates": 6}), "zero_key",
         "model.sparse.ffn.candidates: 3 before, 6 after. Growth by zero_key adds slots that are like those of the "
         "smaller model: set it to 3, or growth.method to split, which copies candidates to more of them."),
        (large, model({**BANK, "dense": 21}), "gram",
         "model.sparse.ffn.dense: 5 before, 21 after. Growth by gram adds slots that are like those of the smaller "
         "model: set it to 5."),
    ):  # fmt: skip
        problems = growth_problems(old, new, Growth(source="x", method=method))
        assert any(message in problem for problem in problems), problems
    with pytest.raises(ConfigError, match="split copies tokens"):
        split(None)


def test_another_z_loss_is_no_growth_and_stops_none():
    small, large, growth = model(BANK), model(AGAIN), Growth(source="x", method="split")
    other = small.model_copy(update={"sparse": small.sparse.model_copy(update={"z_loss": 0.1})})
    assert growth_problems(other, large, growth) == []
    assert "the smaller model has" in growth_problems(other, small, Growth(source="x"))[0]
    more = model(BANK, parameter_tokens={**TOKENS, "qkv": 20})
    source = GrownSource(
        InitialSource(other, 7),
        InitialSource(more, 7),
        old_model=other,
        new_model=more,
        growth=Growth(source="x"),
        seed=1,
    )
    assert source.record == {"method": "zero_key"}


def test_a_chain_with_a_split_is_checked_as_a_whole():
    stages = [
        run_config(run={"dir": "a", "name": name}, model={"parameter_tokens": tokens, "sparse": sparse}, growth=growth)
        for name, tokens, sparse, growth in (
            ("small", TOKENS, None, {"from": "x"}),
            ("split", TOKENS, {"ffn": BANK}, {"from": "x", "method": "split"}),
            ("again", TOKENS, {"ffn": AGAIN}, {"from": "x", "method": "split"}),
            ("big", {**TOKENS, "qkv": 20}, {"ffn": AGAIN}, {"from": "x"}),
        )
    ]
    assert chain_problems(stages) == []
    assert "stage split: model.sparse.ffn" in chain_problems([stages[0], stages[0].model_copy(update={
        "run": stages[1].run, "model": stages[1].model})])[0]  # fmt: skip
