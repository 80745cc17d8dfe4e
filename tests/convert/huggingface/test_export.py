from __future__ import annotations

import json
from importlib import metadata

import pytest
from safetensors.torch import load_file

from megatron_tf.convert.huggingface import configuration, export, verify
from megatron_tf.convert.huggingface.export import ExportedTokenizer, check_target, write_export
from megatron_tf.data.preparation.bpe import train_bpe
from megatron_tf.data.tokenizer import ByteTokenizer, load_tokenizer
from megatron_tf.data.tokenizer_identity import tokenizer_identity
from megatron_tf.errors import CheckpointError, UserError
from megatron_tf.state.parameters import parameter_table

MODEL_FILES = ["config.json", "configuration_tokenformer.py", "generation_config.json", "model.safetensors",
               "modeling_tokenformer.py", "pattention_tokenformer.py"]  # fmt: skip


def test_the_folder_holds_what_transformers_wants(folder, network, tokenizer_file):
    assert sorted(p.name for p in folder.iterdir()) == [*MODEL_FILES, "tokenizer.json", "tokenizer_config.json"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    config = json.loads((folder / "config.json").read_text())
    assert config["scales"][1]["mlp"] == network.scales["blocks.1.ffn"]
    assert config["scales"][0]["o_proj"] == network.scales["blocks.0.attention.proj"]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    end = load_tokenizer(tokenizer_file).eod_id
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == end
    assert set(load_file(folder / "model.safetensors")) == {
        spec.huggingface_name for spec in parameter_table(network.config).values()
    }


def test_a_tokenizer_with_dropout_goes_out_without(network, tokenizer_file, tmp_path):
    content = json.loads(tokenizer_file.read_text())
    content["model"]["dropout"] = 0.5
    (tmp_path / "t.json").write_text(json.dumps(content))
    exported = ExportedTokenizer(load_tokenizer(tmp_path / "t.json"), tmp_path / "t.json")
    write_export(tmp_path / "out", network, exported)  # which compares the tokens of both
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["dropout"] is None


def test_another_kind_of_tokenizer_stays_out(network, tmp_path):
    found = write_export(tmp_path / "out", network, ExportedTokenizer(ByteTokenizer(), None))
    assert set(found) == {"random tokens", "generation"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == MODEL_FILES
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == ByteTokenizer.eod_id


def test_what_computes_something_else_gets_no_name(network, tmp_path, monkeypatch):
    def other_scale(model, scales, eod_id):
        return configuration.huggingface_config(model, {**scales, "blocks.1.attention.key": 6.0}, eod_id)

    monkeypatch.setattr(export, "huggingface_config", other_scale)
    with pytest.raises(CheckpointError, match="computes another function .* on random tokens"):
        write_export(tmp_path / "out", network, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("forgotten", ["DynamicCache", "StaticCache"])
def test_a_cache_that_is_not_read_is_seen(network, tmp_path, monkeypatch, forgotten):
    """As with a transformers that calls it by a name which the export does not know."""
    load = verify.load_exported

    def forgetful(*which):
        model = load(*which)
        forward = model.model.forward

        def without_it(**values):
            keep = {name: value for name, value in values.items() if type(value).__name__ != forgotten}
            return forward(**keep)

        model.model.forward = without_it
        return model

    monkeypatch.setattr(verify, "load_exported", forgetful)
    kind = forgotten.removesuffix("Cache").lower()
    with pytest.raises(CheckpointError, match=f"transformers c.* export.* on generation with a {kind} cache"):
        write_export(tmp_path / "out", network, None)
    assert list(tmp_path.iterdir()) == []


def test_an_export_says_what_it_was_verified_with(folder):
    transformers, torch = metadata.version("transformers"), metadata.version("torch")
    assert json.loads((folder / "config.json").read_text())["verified_with"]["transformers"] == transformers
    for name in ("configuration_tokenformer.py", "modeling_tokenformer.py", "pattention_tokenformer.py"):
        first = (folder / name).read_text().splitlines()[0]
        assert first.startswith(f"# Verified with transformers {transformers} and torch {torch}")


def test_a_model_whose_training_diverged_is_refused(network_of, tmp_path):
    network = network_of()
    network.blocks[1].ffn.value_tokens.data[0] = 1e38
    with pytest.raises(CheckpointError, match="own logits are not finite: its training diverged"):
        write_export(tmp_path / "out", network, None)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_is_not_the_one_of_the_training_is_refused(network, tokenizer_file, tmp_path):
    train_bpe(["another text " * 30], 270, tmp_path / "other.json")
    exported = ExportedTokenizer(load_tokenizer(tokenizer_file), tmp_path / "other.json")
    with pytest.raises(CheckpointError, match="other tokens for English text"):
        write_export(tmp_path / "out", network, exported)
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_a_text_gets_no_token_that_training_never_saw(network, tokenizer_file, tmp_path):
    """Llama, Mistral and BERT put <s> and </s> around each text; padding and truncation may be left from use."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    used = Tokenizer.from_file(str(tokenizer_file))
    end = used.decode([0], skip_special_tokens=False)
    used.post_processor = processors.TemplateProcessing(single=f"{end} $A {end}", special_tokens=[(end, 0)])
    used.enable_padding(length=30)
    used.enable_truncation(4)
    used.save(str(tmp_path / "used.json"))
    write_export(
        tmp_path / "out", network, ExportedTokenizer(load_tokenizer(tmp_path / "used.json"), tmp_path / "used.json")
    )
    exported = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    text = "the cat sat on the mat, and the class"
    expected = load_tokenizer(tokenizer_file).encode_batch([text])[0]
    assert exported(text)["input_ids"] == exported.encode(text) == expected
    assert tokenizer_identity(tmp_path / "out" / "tokenizer.json").same(tokenizer_identity(tokenizer_file))


def test_the_file_that_failed_is_named(network, tmp_path, monkeypatch):
    """transformers keeps a copy of the code in a folder of its own."""
    from transformers import dynamic_module_utils

    (tmp_path / "modules").write_text("in the way")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules" / "cache"))
    with pytest.raises(CheckpointError, match=r"/modules/cache: Not a directory. Nothing was written"):
        write_export(tmp_path / "out", network, None)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path):
    check_target(tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    (tmp_path / "cut.partial").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, message in (("new", "new: exists already. Nothing"), ("cut", "cut.partial: exists already .left behind"),
                          ("link", "link: exists already. Nothing")):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            check_target(tmp_path / name)


def test_transformers_of_the_right_version_is_needed(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "4.57.1")
    with pytest.raises(UserError, match="transformers is 4.57.1.*pip install 'transformers>=5.16,<5.25'"):
        verify.require_transformers()
    monkeypatch.setattr(metadata, "version", lambda name: "5.16.0")
    assert verify.require_transformers() == "5.16.0"

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match="transformers is not installed.*pip install"):
        verify.require_transformers()
