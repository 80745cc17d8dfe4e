from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from launching import train
from prepared import write_tokens
from tooling import assert_refused, tool

from megatron_tf.checkpoint.compare import compare
from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.step_zero import target_folder, write_step_zero
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.config.sections.data import DataSource
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.data.loader import fingerprint
from megatron_tf.data.summary import CorpusSummary, write_summary
from megatron_tf.growth.grow import grow
from megatron_tf.state.optimizer_states import STATES
from megatron_tf.state.parameters import parameter_table
from megatron_tf.state.sources import InitialSource

SMALL = {"qkv": 13, "proj": 11, "ffn": 37}
LARGE = {"qkv": 29, "proj": 11, "ffn": 75}
CONFIG = """
run: {{dir: {folder}/large, name: test}}
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  seq_length: 16
  vocab_size: 99
  parameter_tokens: {{qkv: 29, proj: 11, ffn: 75}}
training: {{train_steps: 2, global_batch_size: 4, micro_batch_size: 2, precision: fp32}}
optimizer: {{lr: 1e-2}}
data:
  train: [{{path: {folder}/tokens}}]
"""


def model(tokens: dict[str, int], **changes: object) -> Model:
    return Model.model_validate({"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16,
                                 "vocab_size": 99, "parameter_tokens": tokens, **changes})  # fmt: skip


def prepare(prefix: Path, tokenizer: str = "a" * 64, documents: int = 40, vocab_size: int = 99) -> None:
    largest = write_tokens(prefix, vocab_size, documents)
    write_summary(prefix, CorpusSummary(documents, 100 * documents, 1, largest, tokenizer, vocab_size, 0, ("a",), 0, 0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Prepared data, a checkpoint `small` of step 5, and the run `large` that has grown from it by zero_key."""
    folder = tmp_path_factory.mktemp("prune")
    prepare(folder / "tokens")
    prepare(folder / "strange", tokenizer="b" * 64)
    prepare(folder / "few", documents=1)
    prepare(folder / "wide", vocab_size=120)
    table, source = parameter_table(model(SMALL)), InitialSource(model(SMALL), 1)
    data = fingerprint([DataSource(path=str(folder / "tokens"))], 1234)
    index = CheckpointIndex(
        step=5, samples=20, tokens=320, model=model(SMALL).model_dump(), scales=source.scales,
        tensors=expected_tensors({name: spec.shape for name, spec in table.items()}),
        adam_steps={name: ((0, spec.numel, 5),) for name, spec in table.items()}, data=data,
    )  # fmt: skip
    pieces = [
        Piece(name, state, 0, spec.numel, source.read(name, "weight", 0, spec.numel) ** power)
        for name, spec in table.items()
        for state, power in zip(STATES, (1, 3, 2))
    ]
    path = save_checkpoint(folder / "small" / "checkpoints", pieces, index, rank=0, world_size=1, token="t")
    start = grow(open_checkpoint(path), model(LARGE), Growth(source="x"), seed=1, data=None)
    write_step_zero(target_folder(folder / "large"), model(LARGE), start, data, lambda done, tensor: None)
    (folder / "large" / "config.yml").write_text(CONFIG.format(folder=folder))
    return folder


def prune(folder: Path, target: str, tokens="qkv=13,ffn=37", *arguments, source="large", data="tokens"):
    return tool("prune_tokens", "--from", folder / source, "--tokens", tokens, "--data", folder / data,
                "--to", folder / target, *arguments)  # fmt: skip


def test_pruning_undoes_a_growth_to_the_last_bit(folder):
    done = prune(folder, "back", "qkv=13,ffn=37", "--samples", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    small = open_checkpoint(folder / "small" / "checkpoints" / "step_00000005")
    back = open_checkpoint(folder / "back" / "checkpoints" / "step_00000000")
    back.verify()
    assert [d for d in compare(small, back) if not d.equal] == []
    for field in ("samples", "tokens", "scales", "adam_steps", "data", "model"):
        assert getattr(back.index, field) == getattr(small.index, field), field
    _, entry = back.index.growth_history
    assert json.loads(json.dumps(entry)) == entry
    assert (entry["method"], entry["from"], entry["to"], entry["tokens"]) == ("pruned", LARGE, SMALL, 320)
    assert entry["loss_before"] == pytest.approx(entry["loss_after"], rel=1e-6) and entry["data_samples"] == 6
    assert f"{entry['loss_before']:.6f} -> {entry['loss_after']:.6f}, on 6 samples of 16 tokens" in done.stdout
    assert "drops 0.00% to 0.00% of what they contribute; τ times 1.0000 to 1.0000" in done.stdout


def test_a_dry_run_measures_and_writes_nothing(folder):
    done = prune(folder, "dry", "proj=5", "--dry-run", source="small")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "qkv 13 tokens, as they are" in lines and "parameters 14,368 -> 13,600" in lines, done.stdout
    (proj,) = [line for line in lines if line.startswith("proj 11 tokens -> 5, which drops ")]
    (loss,) = [line for line in lines if line.startswith("loss ")]
    assert " 0.00%" not in proj and "on 64 samples" in loss and loss.split()[1] != loss.split()[3], done.stdout
    assert any(line.startswith("tokenizer not compared") for line in lines) and not (folder / "dry").exists()


def test_all_that_is_wrong_with_the_counts_is_said_at_once(folder):
    done = prune(folder, "new", "qkv=29,proj=12,ffn=0,mlp=3,ffn=5,proj")
    assert_refused(
        done, "qkv is 29, the checkpoint has 29. Choose 1 to 28", "proj is 12, the checkpoint has 11",
        "ffn is 0, the checkpoint has 75", "'mlp=3' is not KIND=N with a KIND of qkv, proj, ffn", "names ffn twice",
        "'proj' is not KIND=N",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "nothing"}, "nothing.bin: no such file"),
        ({"data": "wide"}, "token id 119 is beyond the vocabulary, model.vocab_size is 99"),
        ({"data": "strange"}, "the data were made with tokenizer bbbbbbbbbbbb"),
        ({"arguments": ("--samples", "126")}, "which has 249 of 16 tokens. Choose 1 to 124"),
        ({"arguments": ("--samples", "0")}, "--samples: 0 to measure"),
        ({"target": "small"}, "holds step_00000005 already. Nothing is overwritten"),
        ({"source": "nothing"}, "there is no such folder"),
    ],
)
def test_a_users_mistake_is_one_message(folder, changes, message):
    arguments = changes.pop("arguments", ())
    done = prune(folder, changes.pop("target", "new"), "qkv=13", *arguments, **changes)
    assert_refused(done, message)
    assert not (folder / "new").exists()


def test_little_data_is_halved(folder):
    done = prune(folder, "dry", "qkv=13", "--dry-run", data="few")
    assert done.returncode == 0 and "on 3 samples of 16 tokens" in done.stdout, done.stdout + done.stderr


BANK = {"group_size": 16, "candidates": 4, "dense": 5}


@pytest.fixture(scope="module")
def candidates(folder) -> Path:
    """The run `candidates`, split from `small` twice."""
    source = folder / "small" / "checkpoints" / "step_00000005"
    for name, number in (("pairs", 2), ("candidates", 4)):
        bigger = model(SMALL, sparse={"ffn": {**BANK, "candidates": number}})
        reader = open_checkpoint(source)
        start = grow(reader, bigger, Growth(source="x", method="split"), seed=1, data=None)
        source = write_step_zero(
            target_folder(folder / name), bigger, start, reader.index.data, lambda done, tensor: None
        )
    return folder


def take(folder: Path, target: str, number: object, *arguments, source="candidates"):
    return tool("prune_tokens", "--from", folder / source, "--candidates", f"ffn={number}", "--data", folder / "tokens",
                "--to", folder / target, *arguments)  # fmt: skip


def test_taking_all_candidates_but_one_undoes_both_splits_to_the_last_bit(candidates):
    done = take(candidates, "dense", 1, "--samples", "6")
    assert done.returncode == 0, done.stdout + done.stderr
    small = open_checkpoint(candidates / "small" / "checkpoints" / "step_00000005")
    back = open_checkpoint(candidates / "dense" / "checkpoints" / "step_00000000")
    back.verify()
    assert [d for d in compare(small, back) if not d.equal] == []
    for field in ("samples", "tokens", "scales", "adam_steps", "data", "model"):
        assert getattr(back.index, field) == getattr(small.index, field), field
    entry = back.index.growth_history[-1]
    assert entry["sparse"] == {"from": {"ffn": BANK}, "to": None} and entry["candidates_by"] in ("drop", "merge")
    assert entry["loss_before"] == pytest.approx(entry["loss_after"], rel=1e-6)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "ffn 4 candidates in each of 2 slots of 16 -> 37 tokens, which every position uses" in lines, done.stdout
    assert "'model.sparse=null'" in done.stdout and "drop leaves out" in " ".join(lines)


def test_what_cannot_be_taken_away_is_one_message(candidates):
    assert_refused(take(candidates, "no", 4), "--candidates: ffn is 4, the checkpoint has 4. Choose 1 to 3")
    assert_refused(
        take(candidates, "no", 1, source="small"), "--candidates: ffn=1, and the model has 0: model.sparse is null"
    )
    assert_refused(
        prune(candidates, "no", "ffn=30", source="candidates"), "Give --candidates ffn=1, which makes the projection"
    )
    done = prune(candidates, "fewer", "qkv=10", "--dry-run", source="candidates")
    assert done.returncode == 0 and "qkv         13 tokens -> 10" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_a_model_with_fewer_candidates_is_trained_further_and_grown_again(candidates, tmp_path):
    before = {"parameter_tokens": SMALL, "sparse": {"ffn": {**BANK, "candidates": 4}}}
    sections = "\n".join(f"  {key}: {json.dumps(section)}" for key, section in before.items())
    config = CONFIG.format(folder=candidates).replace("  parameter_tokens: {qkv: 29, proj: 11, ffn: 75}", sections)
    (tmp_path / "config.yml").write_text(config)
    dense = take(candidates, "one", 1), prune(candidates, "narrow", "qkv=10", source="one")
    for done in (take(candidates, "two", 2), *dense):
        assert done.returncode == 0, done.stdout + done.stderr
        (changes,) = [line for line in done.stdout.splitlines() if "run.dir=" in line]
        done = train(tmp_path, *shlex.split(changes))
        assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout
    bank = "model.sparse={ffn: {group_size: 16, candidates: 6, dense: 5}}"
    done = train(tmp_path, f"run.dir={candidates}/more", f"growth.from={candidates}/two", "growth.method=split", bank)
    assert done.returncode == 0 and "grown from" in done.stdout, done.stdout
    history = open_checkpoint(candidates / "more" / "checkpoints" / "step_00000002").index.growth_history
    assert [entry["method"] for entry in history] == ["split", "split", "pruned", "split"]
    assert history[3]["loss_before"] == pytest.approx(history[3]["loss_after"], rel=1e-5)


@pytest.mark.slow
def test_the_pruned_model_is_trained_further_and_grown_again(folder, tmp_path):
    assert prune(folder, "on", "qkv=10,ffn=30").returncode == 0
    (tmp_path / "config.yml").write_text(CONFIG.format(folder=folder))
    counts = ("model.parameter_tokens.qkv=10", "model.parameter_tokens.ffn=30")
    done = train(tmp_path, f"run.dir={folder}/on", *counts)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stdout
    done = train(tmp_path, f"run.dir={folder}/again", f"growth.from={folder}/on")
    assert done.returncode == 0 and "grown from" in done.stdout, done.stdout
    history = open_checkpoint(folder / "again" / "checkpoints" / "step_00000002").index.growth_history
    assert [entry["method"] for entry in history] == ["zero_key", "pruned", "zero_key"]
    assert history[2]["loss_before"] == pytest.approx(history[2]["loss_after"], rel=1e-5)
