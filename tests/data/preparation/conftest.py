from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from preparing import TEXTS, write_jsonl  # noqa: E402

from megatron_tf.data.preparation.bpe import train_bpe  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(TEXTS[:100], 300, path)
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_jsonl(tmp_path / "in" / "corpus.jsonl", TEXTS)
