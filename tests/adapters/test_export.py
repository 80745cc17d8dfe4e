from __future__ import annotations

import json
import os

import pytest
import torch
from decoders import ARCHITECTURES, decoder, fill, token_ids
from peft import PeftModel, get_peft_model

from megatron_tf.adapters import PattentionConfig
from megatron_tf.adapters.export import export_adapter
from megatron_tf.adapters.loading import load_base, load_exported, load_tokenizer
from megatron_tf.errors import ArgumentError, CheckpointError, DataError

pytestmark = pytest.mark.usefixtures("modules_of_its_own")


def prepare(folder, name="Llama", dtype=torch.float32, **options):
    base = decoder(name).to(dtype)
    base.save_pretrained(folder / "base")
    model = get_peft_model(decoder(name).to(dtype), PattentionConfig(num_tokens=4, **options))
    fill(model)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", folder / "export"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_export_of_each_architecture_computes_what_base_and_adapter_do(name, tmp_path):
    found = export_adapter(*prepare(tmp_path, name))
    assert all(agreement.holds for agreement in found.values()) and len(found) == 3
    exported = load_exported(tmp_path / "export")
    assert not torch.equal(exported(token_ids()).logits, decoder(name)(token_ids()).logits)


def test_frozen_tokens_linear_layers_and_a_base_of_16_bits(tmp_path):
    base, adapter, export = prepare(tmp_path, dtype=torch.bfloat16, modules="linear", frozen_tokens=2)
    (base / "tokenizer.json").write_text("{}")
    export_adapter(base, adapter, export)
    assert (export / "tokenizer.json").read_text() == "{}"
    assert len({file.stat().st_mode for file in export.iterdir()}) == 1
    config = json.loads((export / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and len(config["pattention"]["branches"]) == 14
    expected = PeftModel.from_pretrained(load_base(base), adapter)
    with torch.no_grad():
        torch.testing.assert_close(
            load_exported(export)(token_ids()).logits, expected(token_ids()).logits, rtol=0, atol=1e-5
        )


def test_branches_whose_positions_choose(tmp_path):
    decoder().save_pretrained(tmp_path / "base")
    model = get_peft_model(decoder(), PattentionConfig(num_tokens=12, candidates=3, group_size=2))
    fill(model)
    model.save_pretrained(tmp_path / "adapter")
    found = export_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "export")
    assert all(one.holds for one in found.values())


@pytest.mark.parametrize("name", ["Llama", "GPT2", "GPTNeoX"])
def test_the_model_without_its_head_has_the_branches_too(name, tmp_path):
    """vLLM builds this one."""
    from transformers import AutoModel

    base, adapter, export = prepare(tmp_path, name)
    export_adapter(base, adapter, export)
    model = AutoModel.from_pretrained(export, trust_remote_code=True, local_files_only=True, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(token_ids()).last_hidden_state
        expected = load_exported(export)(token_ids(), output_hidden_states=True).hidden_states[-1]
        plain = decoder(name)(token_ids(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-6)
    assert (hidden - plain).abs().max() > 1e-3


def test_bad_input_is_one_message_and_nothing_is_written(tmp_path):
    base, adapter, export = prepare(tmp_path)
    (tmp_path / "other").mkdir()
    decoder(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ArgumentError, match="the matrices of this model are not those"):
        export_adapter(tmp_path / "other", adapter, export)
    with pytest.raises(CheckpointError, match="config.json: No such file"):
        export_adapter(tmp_path / "nothing", adapter, export)
    with pytest.raises(CheckpointError, match="adapter_config.json: No such file"):
        export_adapter(base, base, export)
    assert not export.exists() and not (tmp_path / "export.partial").exists()
    export_adapter(base, adapter, export)
    with pytest.raises(CheckpointError, match="is an export with an adapter in it"):
        load_base(export)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="missing keys model.layers.2"):
        load_base(base)
    os.truncate(base / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match="transformers cannot load it"):
        load_base(base)


def test_a_mistyped_folder_is_looked_for_here_alone(tmp_path):
    with pytest.raises(DataError, match="none: there is no such folder. Give that of a model of transformers."):
        load_tokenizer(tmp_path / "none")
