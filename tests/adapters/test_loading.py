from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from decoders import decoder
from tokenformers import tokenformer

from megatron_tf.adapters.loading import load_base, load_tokenizer
from megatron_tf.convert.huggingface.configuration import IMAGE_MODEL_TYPE, MODEL_TYPE
from megatron_tf.errors import CheckpointError, DataError

sys.path.insert(0, str(Path(__file__).parents[1] / "finetuning"))
from bases import write_base  # noqa: E402

CODE = "configuration_own"


def write_code(folder: Path, model_type: str) -> None:
    """The folder says that its classes are in a file of its own, which leaves a mark when it is run."""
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": f"{CODE}.Config", "AutoModelForCausalLM": f"{CODE}.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": names}))
    (folder / f"{CODE}.py").write_text(f"open({str(folder / 'was_run')!r}, 'w')\n")


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What the user was asked, and said yes to."""
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
    return questions


def test_the_code_of_a_folder_is_neither_run_nor_asked_for(asked, tmp_path):
    write_base(tmp_path, model=tokenformer())
    write_code(tmp_path, MODEL_TYPE)
    assert load_tokenizer(tmp_path).eos_token == "[eos]"
    assert load_base(tmp_path).config.model_type == MODEL_TYPE
    assert asked == [] and not (tmp_path / "was_run").exists()


def test_a_model_that_needs_code_of_its_own_is_refused_without_a_question(asked, tmp_path):
    write_base(tmp_path, model=decoder())
    write_code(tmp_path, "another")
    with pytest.raises(CheckpointError, match="transformers cannot load it as a causal language model"):
        load_base(tmp_path)
    assert asked == [] and not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("load", [load_base, load_tokenizer])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "checkpoints/step_00000004/manifest.json",
            r"is a run or .*Export it with `megatron_tf convert to-hf .* --to` and",
        ),
        ("manifest.json", r"is a run or a checkpoint of one"),
        ("checkpoints/step_00000004/adapter_config.json", r"is an adapter, or a run of one. Give the base model that"),
        ("config.json", r"is a classifier of images, and adapters are for language models. Give the folder of one"),
    ],
)
def test_what_is_no_base_is_named(load, file, message, tmp_path):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(json.dumps({"model_type": IMAGE_MODEL_TYPE}))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    (write_base(tmp_path) / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="holds no tokenizer. Put the base's there"):
        load_tokenizer(tmp_path)
