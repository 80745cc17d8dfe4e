"""Exports of models whose positions choose among parameter tokens."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from distributed import spawn
from torch import nn

from megatron_tf.convert.huggingface import choices, verify
from megatron_tf.convert.huggingface.configuration import huggingface_config
from megatron_tf.convert.huggingface.export import write_export
from megatron_tf.convert.huggingface.importing import open_export
from megatron_tf.errors import CheckpointError
from megatron_tf.inference.load import load_model
from megatron_tf.model.routing import choose
from megatron_tf.model.tokenformer import TokenFormer

BANK = {"group_size": 16, "candidates": 3, "dense": 32}
NO_DENSE = {**BANK, "dense": 0}


def load(folder: Path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture(scope="module")
def sparse_of(network_of):
    """A network with a bank whose candidates are all chosen, its scores too small for a softmax of all or nothing."""

    def make(bank=BANK, **changes) -> TokenFormer:
        network = network_of(sparse={"ffn": bank}, **changes)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                weight.mul_(0.05 if "balance" in name else 0.5 if "key_tokens" in name else 1)
        return network

    return make


@pytest.fixture(scope="module")
def network(sparse_of) -> TokenFormer:
    return sparse_of()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, network) -> Path:
    path = tmp_path_factory.mktemp("exports") / "sparse"
    write_export(path, network, None)
    return path


@pytest.fixture(scope="module")
def ids():
    return torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("bank", "activation"),
    [(NO_DENSE, "l2_norm_gelu"), (NO_DENSE, "gelu_l2_norm"), (BANK, "gelu_l2_norm"), (BANK, "softmax")],
)
def test_every_kind_goes_out_and_comes_back(sparse_of, tmp_path, ids, bank, activation):
    """`write_export` compares logits, and generation with every cache."""
    network = sparse_of(bank, activation=activation)
    assert all(one.largest > 1 for one in write_export(tmp_path / "out", network, None).values())
    assert torch.equal(load_model(tmp_path / "out")(ids), network(ids))


def test_a_loss_of_the_training_is_not_exported(network):
    sparse = network.config.sparse.model_copy(update={"z_loss": 0.1})
    exported = huggingface_config(network.config.model_copy(update={"sparse": sparse}), network.scales, None)
    assert exported["sparse"] == {"ffn": BANK}


def test_attention_chooses_too(network_of, tmp_path, ids):
    network = network_of(
        sparse={kind: {"group_size": 16, "candidates": 2, "dense": dense} for kind, dense in (("qkv", 8), ("proj", 0))},
        parameter_tokens={"qkv": 40, "proj": 48, "ffn": 96},
    )
    for block in network.blocks:
        for projection in (block.attention.query, block.attention.key, block.attention.value, block.attention.proj):
            projection.bank.balance.data.mul_(0.05)
    write_export(tmp_path / "out", network, None)
    assert torch.equal(load_model(tmp_path / "out")(ids), network(ids))


def test_all_candidates_are_chosen_and_the_configuration_says_how_many(folder, network, ids):
    """Else agreement would say little."""
    assert json.loads((folder / "config.json").read_text())["sparse"] == {"ffn": BANK}
    for ours, theirs in zip(network.blocks, load(folder).model.layers):
        bank, x = theirs.mlp.bank, torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
        chosen = bank.choose(bank.logits(x))
        assert torch.equal(chosen, ours.ffn.choose(ours.ffn.bank.logits(x), ours.ffn.bank.slot_balance()))
        assert all(set(slot.tolist()) == {0, 1, 2} for slot in chosen.mT)


def test_decoding_reads_only_what_it_chooses(folder, ids):
    """All other tokens of the banks are no numbers."""
    from transformers import DynamicCache

    model = load(folder)
    last, chosen = ids[:1, -1:], []
    with torch.no_grad():
        caches = [model(ids[:1, :-1], past_key_values=DynamicCache(config=model.config)).past_key_values for _ in "ab"]
        for layer in model.model.layers:
            bank = layer.mlp.bank
            bank.choose = lambda logits, bank=bank: chosen.append(type(bank).choose(bank, logits)) or chosen[-1]
        expected = model(last, past_key_values=caches[0]).logits
        for layer, candidates in zip(model.model.layers, list(chosen)):
            bank = layer.mlp.bank
            unread = torch.ones(bank.shape[:2], dtype=torch.bool).scatter_(1, candidates.mT, False)
            assert unread.sum() == 2 * len(unread)
            for tokens in (bank.keys, bank.values):
                tokens.unflatten(0, bank.shape)[unread] = torch.nan
        assert torch.equal(model(last, past_key_values=caches[1]).logits, expected)


def test_gradients_are_those_of_our_own_model(folder, network, ids):
    """Of every weight, the router too. The balance has none: it is no part of the loss."""
    model = load(folder)
    loss = model(ids, labels=ids).loss
    loss.backward()
    own = nn.functional.cross_entropy(network(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = torch.autograd.grad(own, list(network.parameters()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(loss, own)
    for ours, theirs, name in (
        (network.blocks[1].ffn, model.model.layers[1].mlp, "blocks.1.ffn"),
        (network.blocks[0].ffn, model.model.layers[0].mlp, "blocks.0.ffn"),
    ):
        grads = {key: grad for (key, _), grad in zip(network.named_parameters(), expected) if key.startswith(name)}
        found = {
            "key_tokens": theirs.keys.weight.grad, "value_tokens": theirs.values.weight.grad.mT,
            "bank.key_tokens": theirs.bank.keys.grad, "bank.value_tokens": theirs.bank.values.grad,
            "bank.router": theirs.bank.router.grad,
        }  # fmt: skip
        assert {key.removeprefix(f"{name}.") for key in grads} == {*found, "bank.balance"} and ours.bank is not None
        for key, grad in found.items():
            assert (grad - grads[f"{name}.{key}"]).norm() < 1e-4 * grad.norm(), key


def perturbed(monkeypatch, by: float):
    """Exports are loaded with routers that are other ones by so much."""
    loaded = verify.load_exported

    def other_routers(*which):
        model = loaded(*which)
        for layer in model.model.layers:
            router = layer.mlp.bank.router
            with torch.no_grad():
                router.add_(torch.randn(router.shape, generator=torch.Generator().manual_seed(4)), alpha=by)
        return model

    monkeypatch.setattr(verify, "load_exported", other_routers)


def test_where_rounding_decides_both_choices_are_right(sparse_of, tmp_path, monkeypatch):
    network = sparse_of()
    for block in network.blocks:
        block.ffn.bank.router.data.fill_(0.1)  # all candidates are as good as each other
        block.ffn.bank.balance.data.zero_()
    perturbed(monkeypatch, 1e-7)
    write_export(tmp_path / "out", network, None)
    monkeypatch.setattr(choices, "_as_good", lambda other: choose)
    with pytest.raises(CheckpointError, match="computes another function .* on random tokens"):
        write_export(tmp_path / "other", network, None)


def test_another_choice_is_another_function(network, tmp_path, monkeypatch):
    perturbed(monkeypatch, 0.1)
    with pytest.raises(CheckpointError, match="computes another function .* on random tokens"):
        write_export(tmp_path / "out", network, None)


def test_what_was_trained_on_with_transformers_comes_back(folder, network, ids, tmp_path):
    model = load(folder).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    model.eval().save_pretrained(tmp_path / "saved")
    back = load_model(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(back(ids), model(ids).logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(load(tmp_path / "saved")(ids).logits, model(ids).logits)
    before = network.state_dict()
    assert not torch.equal(back.blocks[0].ffn.bank.router, before["blocks.0.ffn.bank.router"])
    assert torch.equal(back.blocks[0].ffn.bank.balance, before["blocks.0.ffn.bank.balance"])


def test_adapters_and_fresh_models(folder, ids):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True),
                                             trust_remote_code=True)  # fmt: skip
    bank = fresh.model.layers[0].mlp.bank
    assert 0.01 < bank.keys.std() < 0.03 and not bank.balance.any() and fresh(ids).logits.isfinite().all()
    model = get_peft_model(load(folder), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert torch.isfinite(model.merge_and_unload()(ids).logits).all()


@pytest.mark.parametrize(
    ("sparse", "message"),
    [
        ({"ffn": {**BANK, "group_size": 24}}, "json: sparse.ffn.group_size: 24 .*multiple of 16"),
        ({"ffn": {**BANK, "dense": 40}}, "parameter_tokens.ffn: 96, of which sparse.ffn.dense 40 .* no whole slots"),
        ({"mlp": BANK}, "json: (.|\n)*sparse.mlp: unknown key"),
        ({"ffn": {**BANK, "candidates": 4}}, r"mlp.bank.keys has shape \[192, 64\], config.json says \[256, 64\]"),
        (None, "model.layers.0.mlp.bank.keys(.|\n)*Give the whole folder"),
    ],
)
def test_other_configurations_are_refused(folder, tmp_path, sparse, message):
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sparse": sparse}))
    with pytest.raises(CheckpointError, match=message):
        open_export(tmp_path / "copy")


def tensor_parallel(group, folder, ids):
    os.environ |= {"RANK": str(group.rank), "LOCAL_RANK": str(group.rank), "WORLD_SIZE": str(group.size)}
    single, model = load(folder), load(folder, tp_plan="auto")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, single(ids).logits, rtol=0, atol=2e-4)
    single(ids, labels=ids).loss.backward()
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad for name, parameter in single.named_parameters()}
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_tensor_parallel_plan(folder, ids):
    spawn(tensor_parallel, 2, folder, ids)
