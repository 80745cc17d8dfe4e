"""Official files and exports that somebody changed: they are read, or one message says what is wrong; no code is
run."""

from __future__ import annotations

import json
import random

import pytest
import torch
from mutations import OBJECTS, damaged, encoded, mutated
from safetensors.torch import save, save_file

from megatron_tf.convert.huggingface.configuration import huggingface_config
from megatron_tf.convert.huggingface.importing import INDEX_NAME, open_export
from megatron_tf.convert.official_checkpoint import matching_model
from megatron_tf.convert.official_files import open_official
from megatron_tf.errors import MESSAGE_LIMIT, UserError
from megatron_tf.state.parameters import initial_scales, parameter_table


def outcome(what, use, *arguments) -> str:
    """Of forgery `what`: "read", or the message."""
    try:
        use(*arguments)
    except UserError as error:
        message = str(error)
        assert 0 < len(message) <= 10 * MESSAGE_LIMIT and message.replace("\n", "").isprintable(), (what, message)
        return message
    except BaseException as error:
        raise AssertionError(f"forgery {what}: {error!r}") from error
    return "read"


def read_official(path, given):
    matching_model(open_official(path), given)


def test_a_forged_published_file(tmp_path, weights, model, count=150, seed=0):
    file, chance = tmp_path / "pytorch_model.bin", random.Random(seed)
    found = []
    for number in range(count):
        torch.save(mutated(weights, chance, OBJECTS), file)
        if chance.random() < 0.1:
            file.write_bytes(damaged(file.read_bytes(), chance))
        found.append(outcome(number, read_official, file, chance.choice((model, None))))
    assert found.count("read") < count / 2


@pytest.mark.parametrize("stages", [1, 2])
def test_a_forged_training_checkpoint(tmp_path, weights, model, save_training, stages, count=75, seed=0):
    tag, chance = save_training(tmp_path, weights, 2, stages), random.Random(seed)
    files = {file: file.read_bytes() for file in sorted(tag.iterdir())}
    found = []
    for number in range(count):
        file = chance.choice(list(files))
        content = torch.load(file, weights_only=False)
        content.pop("optimizer", None)
        torch.save(mutated(content, chance, OBJECTS), file)
        found.append(outcome(number, read_official, tag, chance.choice((model, None))))
        file.write_bytes(files[file])
    assert outcome("none", read_official, tag, model) == "read"
    assert 0 < found.count("read") < count


@pytest.fixture
def export(tmp_path, model):
    """A folder as transformers saves it in parts, without a tokenizer and code."""
    model = model.model_copy(update={"num_attention_heads": 2, "rotary_fraction": 0.5})
    config = huggingface_config(model, initial_scales(model), None)
    tensors = {
        spec.huggingface_name: torch.randn(spec.shape[::-1] if spec.transposed else spec.shape)
        for spec in parameter_table(model).values()
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in tensors.items() if places[name] == file}, tmp_path / file)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path


def test_a_forged_export(export, count=200, seed=0):
    chance = random.Random(seed)
    files = {file: file.read_bytes() for file in sorted(export.iterdir())}
    assert outcome("none", open_export, export) == "read"
    found = []
    for number in range(count):
        file = chance.choice(list(files))
        content = files[file]
        if file.suffix == ".json":
            content = (
                damaged(content, chance) if chance.random() < 0.1 else encoded(mutated(json.loads(content), chance))
            )
        else:
            length = int.from_bytes(content[:8], "little")
            header = encoded(mutated(json.loads(content[8 : 8 + length]), chance))
            content = len(header).to_bytes(8, "little") + header + content[8 + length :]
        file.write_bytes(content)
        found.append(outcome((number, file.name), open_export, export))
        file.write_bytes(files[file])
    assert 0 < found.count("read") < count


def test_weights_of_a_type_that_torch_or_the_format_does_not_have(export):
    file = next(export.glob("*-00001-*"))
    content = file.read_bytes()
    for dtype in (b"F8_E4M3", b"F4", b"E8M0", b"C64", b"BOOL", b"U64", b"XYZ"):
        changed = content.replace(b'"F32"', b'"' + dtype + b'"', 1)
        length = int.from_bytes(content[:8], "little") + len(changed) - len(content)
        file.write_bytes(length.to_bytes(8, "little") + changed[8:])
        assert outcome(dtype, open_export, export) != "read"
    head = torch.zeros(16, 8).to(torch.float8_e5m2)
    file.write_bytes(save({"model.embed_tokens.weight": head, "lm_head.weight": head.clone()}))
    assert "of type float8_e5m2" in outcome("head", open_export, export)


@pytest.mark.parametrize(
    "place", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors", "weights.bin", ""]
)
def test_an_index_of_weights_that_leads_elsewhere(export, place):
    index = json.loads((export / INDEX_NAME).read_bytes())
    index["weight_map"]["model.norm.weight"] = place
    (export / INDEX_NAME).write_text(json.dumps(index))
    assert f"weight_map.model.norm.weight is '{place}'" in outcome(place, open_export, export)
