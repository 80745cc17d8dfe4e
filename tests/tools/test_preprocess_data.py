"""The data tools as commands: corpus, tokenizer and token files in a row, and a user's mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.summary import read_summary
from megatron_tf.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # also from a checkout that is not installed
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_corpus_tokenizer_and_data_in_a_row(tmp_path):
    built = run("build_demo_corpus.py", tmp_path, "--max-megabytes", "1")
    assert built.returncode == 0, built.stderr
    trained = run(
        "train_tokenizer.py", "--input", tmp_path / "train.jsonl.zst", "--vocab-size", "400", "--output",
        tmp_path / "tokenizer.json",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    prepared = run(
        "preprocess_data.py", "--input", tmp_path / "*.jsonl.zst", "--tokenizer", tmp_path / "tokenizer.json",
        "--output-prefix", tmp_path / "data" / "demo", "--workers", "2",
    )  # fmt: skip
    assert prepared.returncode == 0, prepared.stderr
    assert "documents (" in prepared.stderr and "MB/s" in prepared.stderr
    dataset, summary = IndexedDataset(tmp_path / "data" / "demo"), read_summary(tmp_path / "data" / "demo")
    assert (summary.documents, summary.tokens) == (dataset.num_documents, dataset.num_tokens)
    first = load_tokenizer(tmp_path / "tokenizer.json").decode(dataset.tokens(0, dataset.document_offsets[1]).tolist())
    assert 'The "assert" statement' in first and first.endswith("<|endoftext|>")


@pytest.mark.parametrize("tool", ["preprocess_data.py", "train_tokenizer.py", "build_demo_corpus.py"])
def test_help(tool):
    shown = run(tool, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage:")


def test_bad_record_is_one_message_and_exit_code_2(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b"\n')
    trained = run("train_tokenizer.py", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "t.json")
    assert (trained.returncode, trained.stdout) == (2, "")
    assert trained.stderr.startswith(f"error: {tmp_path}/in.jsonl:2: invalid JSON") and trained.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_missing_tokenizer_is_one_message_and_exit_code_2(tmp_path):
    (tmp_path / "in.txt").write_text("text")
    failed = run(
        "preprocess_data.py", "--input", tmp_path / "in.txt", "--tokenizer", tmp_path / "t.json",
        "--output-prefix", tmp_path / "out" / "x",
    )  # fmt: skip
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith(f"error: {tmp_path}/t.json: the tokenizer cannot be read")
    assert not (tmp_path / "out").exists()
