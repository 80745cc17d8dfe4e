from __future__ import annotations

import json

import pytest
import torch
from decoders import decoder, token_ids
from peft import PeftModel, get_peft_model
from tokenformers import BANK, LAYERS, TOKENS, WIDTH, tokenformer

from megatron_tf.adapters import PattentionConfig
from megatron_tf.adapters.export import export_adapter
from megatron_tf.adapters.folder import read_adapter, write_adapter
from megatron_tf.adapters.growth import check_growth, grow_adapter, shrink_adapter
from megatron_tf.adapters.loading import load_base, load_exported
from megatron_tf.adapters.merge import compare, merge_adapter, merged_network
from megatron_tf.commands.grow_adapter import main as grow_adapter_command
from megatron_tf.convert.huggingface.importing import open_export
from megatron_tf.errors import ArgumentError, CheckpointError

pytestmark = pytest.mark.usefixtures("modules_of_its_own")


def appended(base, num_tokens=6, **options):
    return get_peft_model(base, PattentionConfig(num_tokens=num_tokens, modules="pattention", **options))


def train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(token_ids(), labels=token_ids()).loss.backward()
        optimizer.step()


@torch.no_grad()
def logits(model):
    return model(token_ids()).logits


@pytest.mark.parametrize("activation", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("sparse", [None, BANK], ids=["dense", "bank"])
def test_appended_tokens_keep_the_function_and_all_of_them_learn(activation, sparse):
    base = tokenformer(activation, sparse).double()
    plain = logits(base)
    model = appended(base)
    torch.testing.assert_close(logits(model), plain, rtol=1e-12, atol=1e-12)
    trained = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 2 * 6 * WIDTH * 5 * LAYERS
    train(model, steps=2)  # the keys move in the first step, the values in the second
    assert all((p != trained[name]).any(-1).all() for name, p in model.named_parameters() if name in trained)
    assert (logits(model) - plain).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model.unload()), plain) and not base.model.layers[0].mlp.keys._forward_hooks


@pytest.mark.parametrize(("activation", "sparse"), [("l2_norm_gelu", None), ("gelu_l2_norm", BANK)])
def test_merging_is_concatenation_in_fp64(activation, sparse, tmp_path):
    tokenformer(activation, sparse).save_pretrained(tmp_path / "base")
    model = appended(load_base(tmp_path / "base"))
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    network = merged_network(open_export(tmp_path / "base"), read_adapter(tmp_path / "adapter")).double()
    found = compare(model.double(), network)
    assert found.error <= 1e-12 * found.largest, found
    assert network.config.parameter_tokens.model_dump() == {kind: count + 6 for kind, count in TOKENS.items()}
    if sparse:
        assert network.config.sparse.ffn.dense == 16 + 6
    own = model.get_submodule("base_model.model.model.layers.1.self_attn.o_proj")
    keys, values = own.pattention_branch.tokens("default")
    joined = network.get_submodule("blocks.1.attention.proj")
    assert torch.equal(joined.key_tokens, torch.cat([own.keys.weight, keys]))
    assert torch.equal(joined.value_tokens, torch.cat([own.values.weight.mT, values]))
    assert joined.scale == 4.0


def test_adapters_side_by_side_are_one_with_the_tokens_of_both(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        model = appended(tokenformer().double())
        train(model, steps=2)
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tokenformer().double(), tmp_path / "a", adapter_name="a")
    alone = logits(model)
    model.load_adapter(tmp_path / "b", adapter_name="b")
    assert torch.equal(logits(model), alone)
    model.base_model.set_adapter(["a", "b"])
    one, other = read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b")
    joined = {
        name: type(branch)(
            torch.cat([branch.keys, other.branches[name].keys]), torch.cat([branch.values, other.branches[name].values])
        )
        for name, branch in one.branches.items()
    }
    write_adapter(tmp_path / "both", type(one)({**one.config, "num_tokens": 12}, joined))
    both = PeftModel.from_pretrained(tokenformer().double(), tmp_path / "both")
    torch.testing.assert_close(logits(both), logits(model), rtol=1e-12, atol=1e-12)


def test_the_merged_folder_is_of_the_usual_kind(tmp_path):
    tokenformer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    model = appended(load_base(tmp_path / "base"), target_modules=["mlp"])
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    found = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert all(agreement.holds for agreement in found.values()) and "base and adapter" in found
    torch.testing.assert_close(logits(load_exported(tmp_path / "merged")), logits(model), rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["parameter_tokens"] == {**TOKENS, "ffn": TOKENS["ffn"] + 6}
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == "{{ messages }}"
    again = appended(load_base(tmp_path / "merged"))  # what was merged is a base in its turn
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_growth_of_appended_tokens_keeps_the_function_and_shrinks_back(tmp_path):
    model = appended(tokenformer().double())
    train(model)
    model.save_pretrained(tmp_path / "small")
    small = read_adapter(tmp_path / "small")
    grown = grow_adapter(small, 10, freeze_old=True)
    assert check_growth(small, grown, "zero_key").holds and grown.config["scale"] is None
    write_adapter(tmp_path / "grown", grown)
    again = PeftModel.from_pretrained(tokenformer().double(), tmp_path / "grown", is_trainable=True)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in again.parameters() if p.requires_grad) == 2 * 4 * WIDTH * 5 * LAYERS
    back = shrink_adapter(grown, 6)
    assert all(torch.equal(one.values, back.branches[name].values) for name, one in small.branches.items())
    with pytest.raises(ArgumentError, match="method: gram needs the tokens of the base"):
        grow_adapter(small, 64, "gram")
    with pytest.raises(ArgumentError, match="Merge the adapter and prune the model"):
        shrink_adapter(small, 3)


def test_the_command_grows_appended_tokens_and_gives_them_back(tmp_path, monkeypatch, capsys):
    tokenformer().save_pretrained(tmp_path / "base")
    model = appended(load_base(tmp_path / "base"))
    train(model)
    model.save_pretrained(tmp_path / "small")
    base = ("--base", tmp_path / "base")

    def grow(*arguments):
        monkeypatch.setattr("sys.argv", ["grow_adapter", *map(str, (*arguments, *base))])
        grow_adapter_command()
        return capsys.readouterr().out

    said = grow("--from", tmp_path / "small", "--tokens", 10, "--freeze-old", "--to", tmp_path / "grown")
    assert "10 tokens, 6 frozen" in said and "zero_key; τ of the base's projections\n" in said
    assert f"on {tmp_path / 'base'}: logits differ by" in said and "\nwrote " in said
    said = grow("--from", tmp_path / "grown", "--tokens", 6, "--shrink", "--to", tmp_path / "back")
    assert "shrink; τ of the base's projections\n" in said and "\nwrote " in said
    small, back = read_adapter(tmp_path / "small"), read_adapter(tmp_path / "back")
    for name, branch in small.branches.items():
        assert torch.equal(branch.keys, back.branches[name].keys)
        assert torch.equal(branch.values, back.branches[name].values)


def test_what_cannot_be_appended_is_one_message():
    everything = {"ffn": {**BANK["ffn"], "dense": 0}}
    for base, options, message in (
        (decoder(), {}, "pattention is for TokenFormers, and this is a LlamaForCausalLM"),
        (tokenformer("softmax"), {}, "in a softmax model these have a weight"),
        (tokenformer(sparse=everything), {}, "all tokens of model.layers.0.mlp are candidates"),
        (tokenformer(), {"target_modules": ["q_proj"]}, "one number of qkv tokens, for k_proj and q_proj and v_proj"),
        (tokenformer(), {"target_modules": ["up_proj"]},
         "'up_proj' is no Pattention of this TokenFormer. Choose of k_pro"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=message):
            appended(base, **options)
        assert not any("pattention" in name for name, _ in base.named_modules())
    with pytest.raises(ArgumentError, match="scale: 2, and appended tokens share τ"):
        PattentionConfig(modules="pattention", scale=2.0)
    both = get_peft_model(tokenformer(), PattentionConfig(num_tokens=2, modules="mlp"))
    with pytest.raises(ArgumentError, match="has a branch of another kind already"):
        both.add_adapter("other", PattentionConfig(num_tokens=2, modules="pattention"))
    with pytest.raises(ArgumentError, match="megatron_tf merge-adapter"):
        appended(tokenformer()).merge_and_unload()


def test_the_wrong_tool_for_a_folder_names_the_right_one(tmp_path):
    tokenformer().save_pretrained(tmp_path / "base")
    get_peft_model(tokenformer(), PattentionConfig(num_tokens=2)).save_pretrained(tmp_path / "parallel")
    appended(tokenformer()).save_pretrained(tmp_path / "appended")
    with pytest.raises(
        CheckpointError, match=r"Keep base and adapter as two folders, .* adapter.modules \[pattention\]"
    ):
        merge_adapter(tmp_path / "base", tmp_path / "parallel", tmp_path / "no")
    with pytest.raises(CheckpointError, match="megatron_tf merge-adapter"):
        export_adapter(tmp_path / "base", tmp_path / "appended", tmp_path / "no")
    appended(tokenformer(seed=1)).save_pretrained(tmp_path / "other")
    with pytest.raises(ArgumentError, match="the matrices of this model are not those"):
        merge_adapter(tmp_path / "base", tmp_path / "other", tmp_path / "no")
    assert not (tmp_path / "no").exists()
