"""Text from a checkpoint, and what users type wrong."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import fields

import pytest
from tooling import assert_refused

from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.commands.generate_text import read_prompts
from megatron_tf.config.sections.model import Model
from megatron_tf.convert.huggingface.export import ExportedTokenizer, write_export
from megatron_tf.data.preparation.bpe import train_bpe
from megatron_tf.data.summary import CorpusSummary, write_summary
from megatron_tf.data.tokenizer import load_tokenizer
from megatron_tf.errors import UserError
from megatron_tf.inference.load import known_eod, load_model
from megatron_tf.state.parameters import parameter_table
from megatron_tf.state.sources import InitialSource

SHAPE = {
    "num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16, "vocab_size": 300,
    "rotary_fraction": 0.5, "parameter_tokens": {"qkv": 5, "proj": 5, "ffn": 9},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of an untrained model with a padded vocabulary, and tokenizers that fit it and do not."""
    folder = tmp_path_factory.mktemp("runs")
    text = "the cat sat on the mat " * 20
    assert train_bpe([text], 280, folder / "fits.json") < 300
    larger = " ".join(f"{a}{b}{c}" for a in "abcdef" for b in "ghijkl" for c in "mnopqr")
    assert train_bpe([larger] * 3, 320, folder / "larger.json") == 320
    model = Model.model_validate(SHAPE)
    source, table = InitialSource(model, 1), parameter_table(model)
    tensors = expected_tensors({name: spec.shape for name, spec in table.items()})
    index = CheckpointIndex(
        step=1, samples=1, tokens=16, model=model.model_dump(mode="json"), scales=dict(source.scales), tensors=tensors,
        adam_steps={name: ((0, spec.numel, 1),) for name, spec in table.items()},
    )  # fmt: skip
    pieces = [
        Piece(name, state, 0, tensor.numel, source.read(name, state, 0, tensor.numel))
        for name, tensor in tensors.items()
        for state in tensor.states
    ]
    save_checkpoint(folder / "run" / "checkpoints", pieces, index, rank=0, world_size=1, token="a")
    config = {
        "run": {"dir": str(folder / "run")}, "model": SHAPE, "optimizer": {"lr": 1e-3},
        "training": {"train_steps": 9, "global_batch_size": 1, "micro_batch_size": 1},
        "data": {"train": [{"path": str(folder / "data")}], "tokenizer": str(folder / "fits.json")},
        "evaluation": {"interval_steps": None},
    }  # fmt: skip
    (folder / "run" / "config.yml").write_text(json.dumps(config))
    return folder


@pytest.fixture
def command(here):
    return lambda *arguments: here("generate_text", *arguments)


@pytest.fixture
def generate_text(folder, command):
    return lambda *arguments: command(folder / "run", "--tokens", 4, *arguments)


@pytest.mark.parametrize("prompt", ["", " ", "the cat ", "the cat sat on the mat " * 9], ids=["none", "blank", "short",
                                                                                              "long"])  # fmt: skip
def test_prompts_are_continued(generate_text, prompt):
    done = generate_text("--prompt", prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(prompt) and len(done.stdout) > len(prompt) + 1
    assert generate_text("--prompt", prompt).stdout == done.stdout
    if not prompt:
        assert generate_text("--seed", "5").stdout != done.stdout


def test_several_prompts_are_written_together(generate_text, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\n\nthe cat sat on the mat\n")
    done = generate_text("--prompts", tmp_path / "prompts.txt", "--temperature", 0)
    assert done.returncode == 0, done.stderr
    alone = [
        generate_text("--prompt", text, "--temperature", 0).stdout for text in ("the cat", "", "the cat sat on the mat")
    ]
    assert done.stdout == "".join(f"--- {number} of 3\n{text}" for number, text in enumerate(alone, 1))
    assert generate_text("--prompt", "the cat", "--prompt", "", "--temperature", 0).stdout.count("---") == 2


def test_prompts_end_where_editors_end_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    for content in ("one\u2028more\n\ntwo\x0cmore", "\ufeffone\u2028more\r\n\r\ntwo\x0cmore\r\n"):
        file.write_bytes(content.encode())
        assert read_prompts(file) == ["one\u2028more", "", "two\x0cmore"]
    file.write_bytes("one".encode("utf-16"))
    with pytest.raises(UserError, match=r"prompts\.txt: is UTF-16 text\. Save the file as UTF-8"):
        read_prompts(file)


def test_top_p(generate_text):
    likeliest = generate_text("--prompt", "the", "--temperature", 0).stdout
    assert generate_text("--prompt", "the", "--top-p", "1e-9").stdout == likeliest


def test_an_export_writes_what_its_checkpoint_does(folder, command, generate_text, tmp_path):
    network, file = load_model(folder / "run"), folder / "fits.json"
    write_export(tmp_path / "out", network, ExportedTokenizer(load_tokenizer(file), file))
    done = command(tmp_path / "out", "--tokens", 4, "--prompt", "the cat")
    assert done.returncode == 0 and done.stdout == generate_text("--prompt", "the cat").stdout, done.stderr
    assert done.stderr == ""
    done = command(tmp_path / "out", "--tokens", 4, "--tokenizer", "bytes")
    assert done.returncode == 0
    assert done.stderr == f"warning: bytes is another tokenizer than {tmp_path}/out/tokenizer.json, the model's own\n"
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert_refused(
        command(tmp_path / "out"), "out: has no tokenizer.json. Give the tokenizer's file with --tokenizer, or --tok"
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "eos_token_id": 256}))
    assert_refused(command(tmp_path / "out"), "token 256 ends a text", "has no file. Give --tokenizer bytes.")
    (tmp_path / "out" / "tokenizer.json").mkdir()
    assert_refused(command(tmp_path / "out"), "out/tokenizer.json: Is a directory")
    (tmp_path / "out" / "config.json").unlink()
    (tmp_path / "out" / "config.json").mkdir()
    assert_refused(command(tmp_path / "out", "--tokenizer", "bytes"), "out/config.json: Is a directory")


def test_the_token_that_ends_a_text(folder, command, generate_text, tmp_path):
    """What the run's data say, the export, or the option: where the tokenizer has two of the usual names."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "fits.json"))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "two.json"))
    end = tokenizer.token_to_id("</s>")
    two = ("--tokenizer", tmp_path / "two.json")
    assert_refused(generate_text(*two), "several of its tokens may end documents", "--eod-token")
    done = generate_text(*two, "--eod-token", "</s>")
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    exported = ExportedTokenizer(load_tokenizer(tmp_path / "two.json", "</s>"), tmp_path / "two.json")
    write_export(tmp_path / "out", load_model(folder / "run"), exported)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == end
    done = command(tmp_path / "out", "--tokens", 4)
    assert (done.returncode, done.stderr) == (0, "")
    settings = json.loads((folder / "run" / "config.yml").read_text())
    settings["data"] |= {"tokenizer": str(tmp_path / "two.json"), "eod_id": end}
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    (run / "config.yml").write_text(json.dumps(settings))
    assert known_eod(run, str(tmp_path / "two.json")) == end
    assert known_eod(run, str(folder / "fits.json")) is None
    assert command(run, "--tokens", 4).returncode == 0


def test_what_a_tokenizer_loses_of_a_prompt_is_said(folder, generate_text, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<unk>": 0, "the": 1, "cat": 2, "</s>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    done = generate_text("--tokenizer", tmp_path / "words.json", "--prompt", "the dog", "--prompt", "the cat")
    assert done.returncode == 0
    assert "warning: the tokenizer loses 3 characters ('dog' 1) of prompt 1\n" in done.stderr
    assert "prompt 2" not in done.stderr


def test_extreme_temperatures(generate_text):
    greedy = generate_text("--temperature", "0", "--prompt", "the")
    assert greedy.returncode == 0
    assert generate_text("--temperature", "1e-320", "--prompt", "the").stdout == greedy.stdout
    assert generate_text("--temperature", "1e300", "--top-k", 10**25).returncode == 0


BAD = {
    "nan": (["--temperature", "nan"], "--temperature is nan. Choose 0 (greedy) or a finite number"),
    "infinite": (["--temperature", "inf"], "--temperature is inf"),
    "negative temperature": (["--temperature", "-1"], "--temperature is -1.0"),
    "negative top-k": (["--top-k", "-1"], "--top-k is -1. Choose 0 (all tokens) or more"),
    "no tokens": (["--tokens", "0"], "--tokens is 0. Choose 1 to 1000000"),
    "too many tokens": (["--tokens", str(10**12)], "--tokens is 1000000000000. Choose 1 to"),
    "top-p": (["--top-p", "0"], "--top-p is 0.0. Choose a number above 0, up to 1"),
    "two kinds of prompts": (["--prompts", "x", "--prompt", "x"], "--prompt and --prompts are both given"),
    "no file of prompts": (["--prompts", "none.txt"], "none.txt: No such file"),
    "seed": (["--seed", str(2**64)], f"--seed is {2**64}. Choose 0 to"),
    "prompt": (["--prompt", os.fsdecode(b"ab\xff")], "--prompt is not UTF-8 at character 2"),
    "suffix": (["--tokenizer", "x"], "x: unknown kind of tokenizer"),
    "missing": (["--tokenizer", "none.json"], "none.json: No such file or directory. The tokenizer cannot be read"),
    "long": (["--tokenizer", "x" * 300 + ".json"], "File name too long. The tokenizer cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(generate_text, case):
    arguments, message = BAD[case]
    assert_refused(generate_text(*arguments), message)


def test_all_problems_at_once(generate_text):
    assert_refused(generate_text("--seed", "-1", "--temperature", "nan"), "--seed is -1", "--temperature is nan")


def test_the_tokenizer_of_a_larger_vocabulary(folder, generate_text):
    done = generate_text("--tokenizer", folder / "larger.json")
    assert_refused(done, "larger.json: has 320 tokens, the model's vocabulary 300", "with --tokenizer")


def test_the_tokenizer_of_another_model(folder, generate_text):
    """What the data were made with is certain, what config.yml names is not."""
    warning = f"warning: bytes is another tokenizer than {folder}/fits.json, the model's own\n"
    done = generate_text("--tokenizer", "bytes")
    assert (done.returncode, done.stderr) == (0, warning)
    own = load_tokenizer(folder / "fits.json").fingerprint
    numbers = dict.fromkeys((f.name for f in fields(CorpusSummary) if f.type == "int"), 1)
    write_summary(folder / "data", CorpusSummary(tokenizer_fingerprint=own, files=(), **numbers))
    try:
        assert_refused(
            generate_text("--tokenizer", "bytes"),
            "bytes: is another tokenizer (SHA-256",
            f"{own[:12]} in {folder}/data.json",
        )
        done = generate_text()
        assert (done.returncode, done.stderr) == (0, "")
        (folder / "data.json").write_text("{")
        done = generate_text("--tokenizer", "bytes")
        assert (done.returncode, done.stderr) == (0, warning)
    finally:
        (folder / "data.json").unlink()


@pytest.mark.parametrize("name", ["none", "x" * 300], ids=["missing", "name too long"])
def test_a_run_that_is_not_there(folder, command, name):
    assert_refused(command(folder / name), folder / name)


def test_a_run_whose_configuration_is_gone(folder, generate_text):
    (folder / "run" / "config.yml").rename(folder / "config.away")
    try:
        assert_refused(generate_text(), "no config.yml with data.tokenizer", "--tokenizer")
        assert generate_text("--tokenizer", folder / "fits.json").returncode == 0
    finally:
        (folder / "config.away").rename(folder / "run" / "config.yml")
