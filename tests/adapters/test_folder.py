from __future__ import annotations

import json
import os

import pytest
import torch
from decoders import decoder, fill, token_ids
from peft import LoraConfig, PeftModel, get_peft_model

from megatron_tf.adapters import PattentionConfig
from megatron_tf.adapters.folder import CONFIG_NAME, WEIGHTS_NAME, read_adapter, write_adapter
from megatron_tf.errors import ArgumentError, CheckpointError


@pytest.fixture
def folder(tmp_path):
    model = get_peft_model(decoder(), PattentionConfig(num_tokens=6, frozen_tokens=2))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def changed(folder, **values):
    path = folder / CONFIG_NAME
    fields = json.loads(path.read_text())
    fields.update(values)
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def test_a_folder_is_read_and_written_again_to_the_last_bit(folder, tmp_path):
    adapter = read_adapter(folder)
    assert len(adapter.branches) == 4 and adapter.branches["model.layers.0.mlp"].keys.shape == (6, 32)
    size = write_adapter(tmp_path / "copy", adapter)
    assert size == (tmp_path / "copy" / WEIGHTS_NAME).stat().st_size
    assert size < 4 * 4 * 2 * 6 * 32 + 10_000
    assert json.loads((folder / CONFIG_NAME).read_text()) == json.loads((tmp_path / "copy" / CONFIG_NAME).read_text())
    models = [PeftModel.from_pretrained(decoder(), place) for place in (folder, tmp_path / "copy")]
    with torch.no_grad():
        assert torch.equal(*(model(token_ids()).logits for model in models))
    with pytest.raises(CheckpointError, match="exists already"):
        write_adapter(tmp_path / "copy", adapter)


def test_one_flipped_bit_is_refused_by_peft_too(folder):
    path = folder / WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for read in (read_adapter, lambda place: PeftModel.from_pretrained(decoder(), place)):
        with pytest.raises(CheckpointError, match="the checksum of .* expected .*copy both again"):
            read(folder)


@pytest.mark.parametrize("keep", [0, 7, 100])
def test_a_file_that_was_cut_off_is_refused(folder, keep):
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="checksum"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": ...}, "scale is missing"),
        ({"scale": 7.0}, "the checksum of"),
        ({"num_tokens": 7}, "the checksum of"),
        ({"checksum": None}, "the checksum of .* expected None"),
        ({"num_tokens": 0}, "num_tokens is 0, expected an integer of at least 1"),
        ({"frozen_tokens": 6}, "frozen_tokens is 6, and there are 6 tokens"),
        ({"format_version": 3}, "format_version is 3, and this megatron_tf knows up to 2. Install a newer one"),
        ({"format_version": 2}, "candidates is missing"),
        ({"candidates": 2}, "candidates is not a field"),
        ({"format_version": 2, "candidates": 2, "group_size": 2}, "candidates is 2 of 2 tokens each, .* whole slots"),
        ({"activation": "relu"}, "activation is 'relu', expected l2_norm_gelu"),
        ({"modules": ["ffn"]}, "modules holds 'ffn'"),
        ({"target_modules": []}, "target_modules must be the names"),
        ({"base": {"model_type": "llama"}}, "base.hidden_size is missing"),
        ({"lora_alpha": 8}, "lora_alpha is not a field"),
        ({"history": [1]}, "history must hold objects"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_message(folder, values, message):
    changed(folder, **values)
    for read in (read_adapter, lambda place: PeftModel.from_pretrained(decoder(), place)):
        with pytest.raises(CheckpointError, match=message):
            read(folder)


def test_what_is_no_adapter_of_ours_is_refused(folder, tmp_path):
    get_peft_model(decoder(), LoraConfig(r=2)).save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="peft_type is 'LORA': the adapter is of another method"):
        read_adapter(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=f"{CONFIG_NAME}: No such file"):
        read_adapter(tmp_path)
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME}: No such file"):
        read_adapter(folder)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS_NAME}: No such file"):
        PeftModel.from_pretrained(decoder(), folder)  # which would look for it at the hub
    os.mkfifo(folder / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="a FIFO"):
        read_adapter(folder)


def test_from_the_hub_the_configuration_comes_before_the_weights(folder, tmp_path):
    cached = tmp_path / "snapshots" / "revision"
    cached.mkdir(parents=True)
    (cached / CONFIG_NAME).write_bytes((folder / CONFIG_NAME).read_bytes())
    assert PattentionConfig.from_pretrained(cached).num_tokens == read_adapter(folder).config["num_tokens"]


def test_tensors_of_other_names_or_shapes_are_refused(folder, tmp_path):
    adapter = read_adapter(folder)
    one = adapter.branches["model.layers.0.mlp"]
    torn = {**adapter.branches, "model.layers.0.mlp": type(one)(one.keys, one.values[:-1])}
    write_adapter(tmp_path / "torn", type(adapter)(adapter.config, torn))
    with pytest.raises(CheckpointError, match=r"mlp.pattention_branch.value_tokens is \[3, 32\], .* says 4 tokens"):
        read_adapter(tmp_path / "torn")
    write_adapter(tmp_path / "none", type(adapter)(adapter.config, {}))
    with pytest.raises(CheckpointError, match="there are none"):
        read_adapter(tmp_path / "none")


def test_only_safetensors_are_written(tmp_path):
    model = get_peft_model(decoder(), PattentionConfig(num_tokens=2))
    with pytest.raises(ArgumentError, match="without safe_serialization=False"):
        model.save_pretrained(tmp_path, safe_serialization=False)
