from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_tf.convert.huggingface.importing import is_export, open_export
from megatron_tf.errors import CheckpointError
from megatron_tf.inference.load import load_model

QUERY_KEYS = "model.layers.1.self_attn.q_proj.keys.weight"
SCALES = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "mlp"), 1.0)


@pytest.fixture
def copy(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def change_config(folder, **values):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def change_tensors(folder, **tensors):
    """None removes a tensor; `__` stands for a dot."""
    weights = load_file(folder / "model.safetensors")
    weights |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, folder / "model.safetensors")


def test_the_way_back_is_exact(folder, network):
    export = open_export(folder)
    assert export.model == network.config and export.scales == network.scales
    weights = network.state_dict()
    assert set(export.weights) == set(weights)
    assert all(torch.equal(export.weights[name], weights[name]) for name in weights)
    ids = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_model(folder)(ids), network(ids))


def test_what_transformers_saved_comes_back(folder, network, tmp_path):
    """In parts, in bf16, and with a head of its own next to the embedding."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    export = open_export(tmp_path / "saved")
    assert export.model == network.config and export.scales == network.scales
    for name, weight in network.state_dict().items():
        assert torch.equal(export.weights[name], weight.bfloat16())


def test_a_head_of_its_own_is_refused(copy):
    embedding = load_file(copy / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(copy, lm_head__weight=embedding.clone())
    open_export(copy)
    for other in (embedding + 1, embedding.bfloat16()):
        change_tensors(copy, lm_head__weight=other)
        with pytest.raises(CheckpointError, match="lm_head.weight is not model.embed_tokens.weight"):
            open_export(copy)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, f"missing tensor {QUERY_KEYS}"),
        (torch.zeros(23, 64), rf"{QUERY_KEYS} has shape \[23, 64\], config.json says \[24, 64\]"),
        (
            torch.full((24, 64), torch.nan),
            f"{QUERY_KEYS} holds values that are infinite or no numbers: .* copy the file",
        ),
        (
            torch.ones(24, 64, dtype=torch.int32),
            f"{QUERY_KEYS} is of type int32, expected float32 or .* Save the model",
        ),
        (torch.ones(24, 64).to(torch.float8_e4m3fn), f"{QUERY_KEYS} is of type float8_e4m3fn, expected float32 or"),
    ],
)
def test_other_tensors_are_refused(copy, tensor, message):
    change_tensors(copy, **{QUERY_KEYS: tensor})
    with pytest.raises(CheckpointError, match=message):
        open_export(copy)


def test_an_adapter_is_not_merged_silently(copy):
    change_tensors(copy, extra__lora_A=torch.zeros(2))
    with pytest.raises(CheckpointError, match="unknown tensor extra.lora_A(.|\n)*merged first"):
        open_export(copy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "config.json: is of a model of type 'llama', expected 'tokenformer'"),
        ({"scales": None}, "config.json: scales: missing. Give the one that to-hf or save_pretrained wrote"),
        ({"scales": "x"}, "config.json: scales: 'x' is no list, with an item for each layer. Give the one"),
        ({"scales": [{}]}, "scales: are of 1 layers, the model has 2"),
        ({"scales": [{}, {}]}, r"scales\[0\]: must have the keys q_proj"),
        ({"scales": [SCALES, {**SCALES, "q_proj": 0}]}, r"scales\[1\].q_proj: 0 is no finite number above 0"),
        ({"scales": [SCALES, {**SCALES, "q_proj": 10**400}]}, r"scales\[1\].q_proj: 10+ is no finite number"),
        ({"layer_norm_eps": 10**400}, "layer_norm_eps: the number 10+..., but a number is expected"),
        ({"num_hidden_layers": 0}, "json: num_hidden_layers: 0 is out of range. It must be at least 1."),
        ({"parameter_tokens": {"qkv": 24, "proj": 40}}, "json: parameter_tokens.ffn: missing, .* Give it a value"),
        (
            {"parameter_tokens": {"qkv": 24, "proj": 40, "ffn": "96"}},
            "json: parameter_tokens.ffn: the text '96', but a whole number is expected. Write 96.",
        ),
        (
            {"vocab_size": 0, "layer_norm_eps": float("nan")},
            r"json: \n  - layer_norm_eps: nan is out of range. It must be a finite number.\n"
            "  - vocab_size: 0 is out of range. It must be at least 1",
        ),
        (
            {"num_attention_heads": 3},
            "json: hidden_size: 64 is not a multiple of num_attention_heads 3. Set it to 63 or 66",
        ),
        ({"rotary_fraction": 0.2, "num_attention_heads": 4}, "json: rotary_fraction: 0.2 of 16 channels a head"),
        ({"vocab_size": 300}, r"model.embed_tokens.weight has shape \[320, 64\], config.json says \[300, 64\]"),
        ({"tie_word_embeddings": False}, "an output head of its own"),
    ],
)
def test_other_configurations_are_refused(copy, values, message):
    change_config(copy, **values)
    with pytest.raises(CheckpointError, match=message):
        open_export(copy)


def test_a_run_in_place_of_an_export_is_named(copy):
    (copy / "config.json").unlink()
    (copy / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=f"^{copy}: is a run or a checkpoint of one, .*growth.from"):
        open_export(copy)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_and_missing_files(copy, name):
    (copy / name).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=f"{name}: is no"):
        open_export(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: No such file"):
        open_export(copy)


def test_what_is_not_the_folder_of_a_model(copy):
    with pytest.raises(CheckpointError, match=rf"config.json: is a file. Give the folder that it lies in, {copy}$"):
        open_export(copy / "config.json")
    (copy / "config.json").rename(copy / "adapter_config.json")
    assert is_export(copy)
    with pytest.raises(CheckpointError, match=r"an adapter without its model. Merge it first, .*merge_and_unload\(\)"):
        open_export(copy)
    (copy / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="config.json: Is a directory"):
        open_export(copy)
