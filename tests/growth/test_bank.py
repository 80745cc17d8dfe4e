"""A bank next to a dense model's tokens keeps the function for any router, and its tokens begin to learn."""

from __future__ import annotations

import pytest
import torch
from tiny import run_config

from megatron_tf.architectures.tokenformer.section import bank_problems, suggested_bank_next_to
from megatron_tf.config.sections.growth import Growth, GrowthMethods
from megatron_tf.config.sections.model import Model
from megatron_tf.errors import ConfigError
from megatron_tf.growth.rules import chain_problems, growth_problems
from megatron_tf.growth.source import GrownSource
from megatron_tf.model import build_model
from megatron_tf.state.parameters import initial_scales, parameter_table
from megatron_tf.state.sources import InitialSource

STATES = ("weight", "exp_avg", "exp_avg_sq")
TOKENS = {"qkv": 13, "proj": 11, "ffn": 37}
BANK = {"group_size": 16, "candidates": 3, "dense": 37}
IDS = torch.randint(0, 99, (3, 16), generator=torch.Generator().manual_seed(0))
WIDTH = 32


def model(bank: dict | None = None, **changes) -> Model:
    tokens = {**TOKENS, **({"ffn": 37 + 2 * 16} if bank else {}), **changes.pop("tokens", {})}
    return run_config(model={"parameter_tokens": tokens, "sparse": bank and {"ffn": bank}, **changes}).model


def moments(old: Model) -> InitialSource:
    """An initial state whose moments are the numbers of the elements, at age 5."""
    source = InitialSource(old, 7)
    initial = source.read
    source.read = lambda name, state, low, high: (  # type: ignore[method-assign]
        initial(name, state, low, high) if state == "weight" else torch.arange(low, high, dtype=torch.float32)
    )
    source.adam_steps = lambda name, low, high: [(low, high, 5)]  # type: ignore[method-assign]
    return source


def grown(bank: dict | None = None, growth: Growth | None = None, **changes) -> tuple[Model, GrownSource]:
    old, new = model(activation=changes.get("activation", "l2_norm_gelu")), model(bank or BANK, **changes)
    growth = growth or Growth(source="small", method="bank")
    return new, GrownSource(
        moments(old), InitialSource(new, 5), old_model=old, new_model=new, growth=growth, seed=3
    )  # fmt: skip


def built(of: Model, source) -> torch.nn.Module:
    result = build_model(of, scales=source.scales, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            source.read_into(name, "weight", 0, parameter.view(-1))
    return result


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("num_layers", [2, 3])
def test_the_function_stays(activation, num_layers):
    small = model(activation=activation)
    large, source = grown(activation=activation, num_layers=num_layers)
    after, before = built(large, source), built(small, InitialSource(small, 7))
    torch.testing.assert_close(after(IDS), before(IDS), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for block in after.blocks:
            block.ffn.bank.router.normal_()
            block.ffn.bank.balance.normal_()
    torch.testing.assert_close(after(IDS), before(IDS), rtol=1e-12, atol=1e-12)
    assert source.preserves
    assert num_layers > 2 or source.scales == initial_scales(small)


def test_new_keys_learn_at_once_and_the_rest_of_the_bank_after_them():
    large, source = grown()
    after = built(large, source)
    bank = after.blocks[0].ffn.bank
    after(IDS).square().mean().backward()
    assert bank.key_tokens.grad.any() and not bank.value_tokens.grad.any() and not bank.router.grad.any()
    with torch.no_grad():
        bank.key_tokens -= bank.key_tokens.grad
    after.zero_grad()
    after(IDS).square().mean().backward()
    assert bank.value_tokens.grad.any() and bank.router.grad.any()


def test_the_dense_tokens_keep_their_state_and_the_bank_begins_afresh():
    large, source = grown()
    old = moments(model())
    for name, spec in parameter_table(large).items():
        for state in STATES:
            found = source.read(name, state, 0, spec.numel)
            parts = [source.read(name, state, low, min(low + 177, spec.numel)) for low in range(0, spec.numel, 177)]
            assert torch.equal(found, torch.cat(parts))
            if ".bank." not in name:
                assert torch.equal(found, old.read(name, state, 0, spec.numel))
            elif state != "weight" or name.endswith(("key_tokens", "balance")):
                assert not found.any()
        age = 0 if ".bank." in name else 5
        assert source.adam_steps(name, 0, spec.numel) == [(0, spec.numel, age)]
    values = source.read("blocks.0.ffn.bank.value_tokens", "weight", 0, 2 * 3 * 16 * WIDTH).view(6, -1)
    assert len({tuple(row.tolist()) for row in values}) == 6
    assert source.record["method"] == "bank" and source.record["sparse"] == {"from": None, "to": {"ffn": BANK}}


def test_noise_is_on_the_old_tokens_and_other_tokens_can_grow_by_methods_of_their_own():
    growth = Growth(source="x", method="bank", noise=0.1, methods=GrowthMethods(qkv="random"))
    large, source = grown(growth=growth, tokens={"qkv": 20})
    assert not source.preserves and source.record["method"] == {"qkv": "random", "ffn": "bank"}
    change = source.read("blocks.0.ffn.key_tokens", "weight", 0, 37 * WIDTH) / moments(model()).read(
        "blocks.0.ffn.key_tokens", "weight", 0, 37 * WIDTH
    )
    assert 0.08 < change.std() < 0.12
    assert not source.read("blocks.0.ffn.bank.key_tokens", "weight", 0, 99).any()


def test_what_cannot_be_is_said_before():
    small, large = model(), model(BANK)
    bank, ffn_gram = Growth(source="x", method="bank"), GrowthMethods(ffn="gram")
    assert growth_problems(small, large, bank) == []
    for old, new, growth, message in (
        (small, model(tokens={"ffn": 69}), bank,
         "growth.method: bank adds candidates to the 37 ffn tokens, and the model has none, or one a slot. Set "
         "model.sparse.ffn to {group_size: 16, candidates: 4, dense: 37}, or growth.method to zero_key, which adds "
         "tokens or layers."),
        (small, model(tokens={"qkv": 33, "ffn": 69}), bank,
         "adds candidates to the 13 qkv and 37 ffn tokens, and the model has none, or one a slot. Set model.sparse.qkv "
         "to {group_size: 16, candidates: 4, dense: 13} and model.parameter_tokens.qkv to 45 and model.sparse.ffn to "
         "{group_size: 16, candidates: 4, dense: 37}, or growth.method to zero_key"),
        (small, small, bank,
         "Set model.sparse.ffn to {group_size: 16, candidates: 4, dense: 37} and model.parameter_tokens.ffn to 53; to "
         "go on with the same model, set branch instead of growth."),
        (small, model({**BANK, "candidates": 1}), bank,
         "Set model.sparse.ffn to {group_size: 16, candidates: 4, dense: 37}, or growth.method to zero_key"),
        (large, model({**BANK, "candidates": 6}), bank,
         "growth.method: bank begins with a dense model, and the smaller one has model.sparse already. Set it to "
         "zero_key to add slots"),
        (large, model(BANK, tokens={"ffn": 85}), bank, "growth.method: bank begins with a dense model"),
        (small, model({**BANK, "dense": 21}, tokens={"ffn": 37}), bank,
         "model.sparse.ffn.dense: 21, and the smaller model has 37 ffn tokens, which stay in use at every position. "
         "Set it to 37, and model.parameter_tokens.ffn to 53; or set growth.method to split, which makes candidates"),
        (small, model({**BANK, "dense": 21}), bank, "at every position. Set it to 37."),
        (model(activation="softmax"), model(BANK, activation="softmax"), bank,
         "bank cannot keep the function of a softmax model: a zero key has the weight exp(0) = 1, not 0. Set it to "
         "split"),
        (small, large, bank.model_copy(update={"methods": ffn_gram}),
         "growth.methods.ffn: gram, and growth.method bank"),
        (small, model(BANK, tokens={"qkv": 20}), bank,
         "model.parameter_tokens.qkv: 13 before, 20 after, and model.sparse.qkv is null or has one candidate, which "
         "leaves nothing to choose. Set model.sparse.qkv to {group_size: 16, candidates: 4, dense: 13} and "
         "model.parameter_tokens.qkv to 29, or growth.methods.qkv to zero_key."),
        (small, large, Growth(source="x"), "or to bank, which puts candidates next to them"),
    ):  # fmt: skip
        problems = growth_problems(old, new, growth)
        assert any(message in problem for problem in problems), problems
    with pytest.raises(ConfigError, match="bank adds candidates"):
        GrownSource(
            moments(small), moments(large), old_model=small, new_model=model(tokens={"ffn": 69}), growth=bank, seed=1
        )


@pytest.mark.parametrize("after", [30, 37, 38, 53, 60, 69, 85, 600])
def test_the_bank_that_a_message_names_is_one_that_can_grow(after):
    bank, used = suggested_bank_next_to(37, after)
    assert used >= after and (used == after) == (after > 37 and (after - 37) % 16 == 0)
    new = model(bank.model_dump(), tokens={"ffn": used})
    assert growth_problems(model(), new, Growth(source="x", method="bank")) == [] == list(bank_problems(new))


def test_a_bank_in_a_chain_is_split_and_gets_more_slots():
    stages = [
        run_config(run={"dir": "a", "name": name}, model={"parameter_tokens": {**TOKENS, "ffn": ffn}, "sparse": sparse},
                   growth={"from": "x", "method": method})
        for name, ffn, sparse, method in (
            ("small", 37, None, "zero_key"),
            ("bank", 69, {"ffn": BANK}, "bank"),
            ("split", 69, {"ffn": {**BANK, "candidates": 9}}, "split"),
            ("slots", 101, {"ffn": {**BANK, "candidates": 9}}, "zero_key"),
        )
    ]  # fmt: skip
    assert chain_problems(stages) == []
