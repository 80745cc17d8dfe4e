"""A preparation of 1,500 short documents, and what it wrote."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path

from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.preparation.preprocess import PreprocessSettings, preprocess
from megatron_tf.data.preparation.progress import ProgressDisplay
from megatron_tf.data.summary import CorpusSummary
from megatron_tf.data.tokenizer import load_tokenizer

TEXTS = [f"Document {number} says: the fox number {number * number} jumps.\n" for number in range(1500)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(tokenizer: Path, inputs: Path, prefix: Path, **options) -> dict[str, CorpusSummary]:
    settings = PreprocessSettings((str(inputs),), str(tokenizer), str(prefix), **options)
    return preprocess(settings, ProgressDisplay(io.StringIO()))


def documents(prefix: str | Path, tokenizer: Path) -> list[str]:
    """Texts of the documents; each must end with the end-of-document token."""
    encoder, dataset = load_tokenizer(tokenizer), IndexedDataset(prefix)
    offsets = dataset.document_offsets.tolist()
    ids = [dataset.tokens(*ends).tolist() for ends in pairwise(offsets)]
    assert all(document[-1] == encoder.eod_id for document in ids)
    return [encoder.decode(document[:-1]) for document in ids]


def shards(folder: Path, number: int = 6) -> Path:
    """A glob of `number` files of documents."""
    for index in range(number):
        write_jsonl(folder / f"{index}.jsonl", TEXTS[index::number])
    return folder / "*.jsonl"


def token_files(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]
