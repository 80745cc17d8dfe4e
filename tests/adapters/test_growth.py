from __future__ import annotations

import pytest
import torch
from decoders import decoder, fill, token_ids
from peft import PeftModel, get_peft_model

from megatron_tf.adapters import PattentionConfig
from megatron_tf.adapters.folder import Adapter, Branch, read_adapter, write_adapter
from megatron_tf.adapters.growth import check_growth, compare, grow_adapter, shrink_adapter
from megatron_tf.adapters.tuner import adapter_of
from megatron_tf.adapters.vllm_plugin import add_adapter
from megatron_tf.errors import ArgumentError, CheckpointError

WIDTH = 32


def adapter(num_tokens: int = 16, **fields: object) -> Adapter:
    """Two branches, the second of another width in and out."""
    generator = torch.Generator().manual_seed(0)
    branches = {
        name: Branch(torch.randn(num_tokens, d_in, generator=generator), torch.randn(num_tokens, d_out,
                                                                                     generator=generator) * 0.1)
        for name, d_in, d_out in (("model.layers.0.mlp", WIDTH, WIDTH), ("model.layers.0.mlp.down_proj", 48, 24))
    }  # fmt: skip
    base = {"model_type": "llama", "hidden_size": WIDTH, "num_layers": 1, "vectors": None, "matrices": None}
    config = {"format_version": 1, "num_tokens": num_tokens, "frozen_tokens": 0, "scale": num_tokens**0.5, "base": base,
              "activation": "l2_norm_gelu", "modules": ["mlp"], "target_modules": ["mlp"], "history": [],
              "checksum": None, "peft_type": "PATTENTION"}  # fmt: skip
    return Adapter({**config, **fields}, branches)


def split() -> Adapter:
    """Slots of 8 tokens, each with 4 candidates."""
    return grow_adapter(adapter(), 64, "split", group_size=8)


def same(one: Adapter, other: Adapter) -> bool:
    return all(
        torch.equal(branch.keys, other.branches[name].keys) and torch.equal(branch.values, other.branches[name].values)
        for name, branch in one.branches.items()
    )


@pytest.mark.parametrize("methods", [["zero_key"], ["gram"], ["zero_key", "zero_key"], ["gram", "zero_key"],
                                     ["zero_key", "gram"]], ids="-".join)  # fmt: skip
def test_growth_keeps_the_function_also_in_chains(methods):
    first = now = adapter()
    for method in methods:
        tokens = 4 * now.config["num_tokens"]
        now = grow_adapter(now, tokens, method)
        assert now.config["num_tokens"] == tokens and now.config["history"][-1]["method"] == method
        expected = now.config["history"][-1]["scale_from"] if method == "zero_key" else tokens**0.5
        assert now.config["scale"] == expected
    assert compare(first, now).holds and compare(first, now).largest > 0.1
    assert same(first, Adapter(first.config, {n: Branch(b.keys[:16], b.values[:16]) for n, b in now.branches.items()}))
    # no token is dead: its key or its value is not 0
    assert all((b.keys.any(1) | b.values.any(1)).all() for b in now.branches.values())


def test_a_split_keeps_the_function_of_any_choice_and_merging_gives_it_back():
    first, now = adapter(), split()
    assert now.config["candidates"] == 4 and now.config["scale"] == 4.0 and now.config["format_version"] == 2
    again = grow_adapter(now, 128, "split", seed=3)
    for one in (now, again):
        assert check_growth(first, one, "split").holds
        assert {name: tuple(branch.router.shape) for name, branch in one.branches.items()} == {
            "model.layers.0.mlp": (one.config["num_tokens"] // 8, WIDTH),
            "model.layers.0.mlp.down_proj": (one.config["num_tokens"] // 8, 48)
        }  # fmt: skip
    back = shrink_adapter(again, 64)
    assert back.config["candidates"] == 4 and same(back, now) and compare(now, back).holds
    dense = shrink_adapter(back, 16)
    assert same(dense, first) and "candidates" not in dense.config and dense.config["format_version"] == 1
    assert [entry["method"] for entry in dense.config["history"]] == ["split", "split", "shrink", "shrink"]


def test_a_second_split_of_the_same_seed_shares_its_positions_out():
    """Its routers are not those of the first split again, which would send each candidate's positions to one copy."""
    again = grow_adapter(split(), 256, "split")
    x = torch.randn(4096, WIDTH, generator=torch.Generator().manual_seed(5))
    router = again.branches["model.layers.0.mlp"].router.view(2, 16, WIDTH)
    for slot in router:
        load = torch.bincount((x @ slot.mT).argmax(1), minlength=16)
        assert load.min() > 4096 / 16 / 4, load


def test_of_candidates_that_have_parted_the_best_way_is_taken():
    parted = split()
    for branch in parted.branches.values():
        branch.values.view(2, 4, 8, -1)[:, 1:] *= 1e-3
        branch.balance.view(2, 4)[:, 0] = 1.0
    kept = shrink_adapter(parted, 16)
    assert same(kept, adapter()) and compare(parted, kept).holds


def test_random_growth_changes_the_function_and_is_let_through():
    grown = grow_adapter(adapter(), 32, "random")
    assert not check_growth(adapter(), grown, "random").holds
    with pytest.raises(CheckpointError, match="changes the adapter's function"):
        check_growth(adapter(), grown, "zero_key")


def test_new_values_are_as_large_as_old_ones_and_follow_the_seed():
    grown = grow_adapter(adapter(), 512)
    values = grown.branches["model.layers.0.mlp"].values[16:]
    assert values.std().item() == pytest.approx(0.1, rel=0.1)
    assert same(grown, grow_adapter(adapter(), 512)) and not same(grown, grow_adapter(adapter(), 512, seed=1))


def test_what_was_frozen_comes_back_to_the_last_bit():
    grown = grow_adapter(adapter(), 24, freeze_old=True)
    assert grown.config["frozen_tokens"] == 16
    for branch in grown.branches.values():
        branch.keys[16:] += 1.0
        branch.values[16:] += 1.0
    back = shrink_adapter(grown, 16)
    assert same(back, adapter())
    assert (back.config["frozen_tokens"], back.config["scale"]) == (0, 4.0)
    twice = grow_adapter(grown, 64, "gram", freeze_old=True)
    back = shrink_adapter(twice, 24)
    assert same(back, grown) and (back.config["frozen_tokens"], back.config["scale"]) == (16, 4.0)


def test_tokens_that_were_frozen_from_the_start_are_all_that_is_left():
    first = adapter(frozen_tokens=4)
    left = shrink_adapter(first, 4)
    assert (left.config["num_tokens"], left.config["frozen_tokens"], left.config["scale"]) == (4, 0, 4.0)
    assert all(torch.equal(own.keys, first.branches[name].keys[:4]) for name, own in left.branches.items())


def test_shrinking_drops_what_contributes_least():
    grown = grow_adapter(adapter(), 40)
    back = shrink_adapter(grown, 16)
    assert same(back, adapter()) and back.config["scale"] == pytest.approx(4.0, abs=1e-12)
    strong = adapter()
    for branch in strong.branches.values():
        branch.values[::2] *= 1e-3
    half = shrink_adapter(strong, 8)
    kept = {name: Branch(one.keys[1::2], one.values[1::2]) for name, one in strong.branches.items()}
    assert same(half, Adapter(half.config, kept))
    assert half.config["scale"] < 4.0
    found = compare(strong, half)
    assert found.error < 0.5 * found.largest


def test_frozen_tokens_stay_when_others_are_dropped():
    grown = grow_adapter(adapter(), 24, freeze_old=True)
    for branch in grown.branches.values():
        branch.keys[20:] += 1.0
    fewer = shrink_adapter(grown, 20)
    assert fewer.config["frozen_tokens"] == 16
    for name, branch in fewer.branches.items():
        assert torch.equal(branch.keys[:16], adapter().branches[name].keys)
        assert torch.equal(branch.keys[16:], grown.branches[name].keys[20:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: grow_adapter(adapter(), 16), "num_tokens: 16, and the adapter has 16 tokens. Give more"),
        (
            lambda: grow_adapter(adapter(), 20, "gram"),
            "gram needs at least 16 new tokens.* Give at least 32, or zero_key",
        ),
        (lambda: grow_adapter(adapter(scale=9.0), 64, "gram"), "more than the 9 of now. Give more than 81"),
        (lambda: grow_adapter(adapter(), 64, "bank"), "method: the text 'bank'"),
        (lambda: grow_adapter(adapter(), 24, "split"), "num_tokens: 24, and split copies each of the 16 .* as 32"),
        (lambda: grow_adapter(adapter(), 32, "split", group_size=6), "group_size: 6 does not divide the 16 .* 4 or 8"),
        (lambda: grow_adapter(adapter(), 32, "split", freeze_old=True), "freeze_old: split copies all tokens"),
        (lambda: grow_adapter(adapter(), 32, group_size=8), "group_size: 8, and zero_key makes no candidates"),
        (lambda: grow_adapter(split(), 128), "method: zero_key adds tokens .* among 4 candidates. Set it to split"),
        (lambda: grow_adapter(split(), 128, "split", group_size=4), "candidates are of 8 tokens. Leave it out"),
        (
            lambda: shrink_adapter(split(), 24),
            "num_tokens: 24, and of 4 candidates whole ones go, 16 tokens .* 16 or 32",
        ),
        (lambda: shrink_adapter(adapter(), 16), "Give fewer to shrink it"),
        (lambda: shrink_adapter(grow_adapter(adapter(), 24, freeze_old=True), 8), "16 tokens are frozen, which stay"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        change()


def test_a_split_folder_goes_on_in_peft_and_its_copies_part(tmp_path):
    model = get_peft_model(decoder().double(), PattentionConfig(num_tokens=8))
    fill(model)
    model.save_pretrained(tmp_path / "old")
    write_adapter(tmp_path / "new", grow_adapter(read_adapter(tmp_path / "old"), 24, "split", group_size=4))
    new = PeftModel.from_pretrained(decoder().double(), tmp_path / "new", is_trainable=True)
    with torch.no_grad():
        torch.testing.assert_close(new(token_ids()).logits, model(token_ids()).logits, rtol=0, atol=1e-12)
    optimizer = torch.optim.AdamW([p for p in new.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        new(token_ids(), labels=token_ids()).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in new.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    branch = new.base_model.model.model.layers[0].mlp.pattention_branch.bank["default"]
    copies = branch.key_tokens.view(2, 3, 4, -1)
    assert not torch.equal(copies[:, 0], copies[:, 1]) and branch.balance.any()
    with torch.no_grad():
        expected = new(token_ids()).logits
    new.save_pretrained(tmp_path / "trained")
    stored, held = read_adapter(tmp_path / "trained"), adapter_of(new)
    assert stored.config["candidates"] == 3 and set(stored.branches) == set(held.branches)
    for name, one in held.branches.items():
        assert all(torch.equal(tensor, stored.branches[name].tensors()[leaf]) for leaf, tensor in one.tensors().items())
    write_adapter(tmp_path / "copy", held)
    for folder in ("trained", "copy"):
        loaded = PeftModel.from_pretrained(decoder().double(), tmp_path / folder)
        with torch.no_grad():
            assert torch.equal(loaded(token_ids()).logits, expected)
            loaded.disable_adapter_layers()
            assert torch.equal(loaded(token_ids()).logits, decoder().double()(token_ids()).logits)
    served = decoder().double()
    add_adapter(served, tmp_path / "trained", served.config)
    with torch.no_grad():
        # vLLM's branches are made in the default type: the tokens were rounded to fp32
        torch.testing.assert_close(served.double()(token_ids()).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["zero_key", "gram"])
def test_a_grown_folder_goes_on_in_peft_and_its_new_tokens_learn(method, tmp_path):
    model = get_peft_model(decoder(), PattentionConfig(num_tokens=8))
    fill(model)
    model.save_pretrained(tmp_path / "old")
    grown = grow_adapter(read_adapter(tmp_path / "old"), 16, method, freeze_old=True)
    write_adapter(tmp_path / "new", grown)
    new = PeftModel.from_pretrained(decoder(), tmp_path / "new", is_trainable=True)
    with torch.no_grad():
        before = model(token_ids()).logits
        torch.testing.assert_close(new(token_ids()).logits, before, rtol=0, atol=1e-5)
    start = {name: p.detach().clone() for name, p in new.named_parameters() if "pattention" in name}
    optimizer = torch.optim.AdamW([p for p in new.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        new(token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in new.named_parameters():
        if name in start:
            moved = (parameter - start[name]).any(1)
            assert not moved.any() if "frozen_" in name else moved.all()
    new.save_pretrained(tmp_path / "trained")
    write_adapter(tmp_path / "back", shrink_adapter(read_adapter(tmp_path / "trained"), 8))
    back = PeftModel.from_pretrained(decoder(), tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(back(token_ids()).logits, before)
