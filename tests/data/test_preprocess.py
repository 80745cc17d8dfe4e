"""Text to token files: what is written, for any number of workers, and what happens to bad input."""

from __future__ import annotations

import hashlib
import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_tf.data.bpe import train_bpe
from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.preprocess import EncodedBatch, PreprocessSettings, Progress, is_held_out, preprocess
from megatron_tf.data.summary import CorpusSummary, read_summary
from megatron_tf.data.tokenizer import load_tokenizer
from megatron_tf.errors import DataError

TEXTS = [f"Document {number} says: the fox number {number * number} jumps.\n" for number in range(1500)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(TEXTS[:100], 300, path)
    return path


@pytest.fixture
def corpus(tmp_path) -> Path:
    return write_jsonl(tmp_path / "in" / "corpus.jsonl", TEXTS)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run(tokenizer: Path, inputs: Path, prefix: Path, **options) -> dict[str, CorpusSummary]:
    settings = PreprocessSettings((str(inputs),), str(tokenizer), str(prefix), **options)
    return preprocess(settings, Progress(io.StringIO()))


def documents(prefix: str | Path, tokenizer: Path) -> list[str]:
    """Texts of the documents; each must end with the end-of-document token."""
    encoder, dataset = load_tokenizer(tokenizer), IndexedDataset(prefix)
    offsets = dataset.document_offsets.tolist()
    ids = [dataset.tokens(*ends).tolist() for ends in pairwise(offsets)]
    assert all(document[-1] == encoder.eod_id for document in ids)
    return [encoder.decode(document[:-1]) for document in ids]


def test_documents_come_back(tokenizer, corpus, tmp_path):
    summary = run(tokenizer, corpus, tmp_path / "out" / "x")[str(tmp_path / "out" / "x")]
    assert documents(tmp_path / "out" / "x", tokenizer) == TEXTS
    dataset = IndexedDataset(tmp_path / "out" / "x")
    all_ids = dataset.tokens(0, dataset.num_tokens)
    assert summary == read_summary(tmp_path / "out" / "x") == CorpusSummary(
        documents=1500, tokens=dataset.num_tokens, bytes=sum(map(len, TEXTS)), max_token_id=int(all_ids.max()),
        tokenizer_fingerprint=hashlib.sha256(tokenizer.read_bytes()).hexdigest(), vocab_size=300, eod_id=0,
        files=(str(corpus),), skipped_records=0, empty_documents=0,
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.bin", "x.idx", "x.json"]


def test_workers_do_not_change_the_output(tokenizer, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_tf.data.preprocess.BATCH_DOCUMENTS", 50)  # more batches than may be under way at once
    for workers in (1, 2):
        run(tokenizer, corpus, tmp_path / f"out{workers}", workers=workers, validation_fraction=0.2)
    for name in ("_train.bin", "_train.idx", "_validation.bin", "_validation.idx"):
        assert (tmp_path / f"out1{name}").read_bytes() == (tmp_path / f"out2{name}").read_bytes()


def test_split_by_text_is_complete_and_independent_of_order(tokenizer, corpus, tmp_path):
    run(tokenizer, corpus, tmp_path / "x", validation_fraction=0.2)
    train, validation = (documents(tmp_path / f"x_{split}", tokenizer) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(TEXTS)
    assert 0.15 < len(validation) / len(TEXTS) < 0.25
    reverse = write_jsonl(tmp_path / "in" / "reverse.jsonl", TEXTS[::-1] + validation[:3])
    run(tokenizer, reverse, tmp_path / "y", validation_fraction=0.2)
    assert set(documents(tmp_path / "y_validation", tokenizer)) == set(validation)


def test_held_out_share_grows_with_the_fraction():
    names = [str(number).encode() for number in range(4000)]
    small, large = ({name for name in names if is_held_out(name, fraction)} for fraction in (0.1, 0.3))
    assert small < large and 320 < len(small) < 480 and 1080 < len(large) < 1320
    assert not any(is_held_out(name, 0.0) for name in names)


BAD_LINES = ['{"text": "good"}', "{", '{"body": "x"}', '{"text": ""}', '{"text": "also good"}']


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_record_is_fatal_and_leaves_the_older_files(tokenizer, tmp_path, workers):
    (tmp_path / "in").mkdir()
    bad = tmp_path / "in" / "bad.jsonl"
    bad.write_text("\n".join(BAD_LINES))
    out = tmp_path / "out"
    run(tokenizer, write_jsonl(tmp_path / "in" / "good.jsonl", TEXTS), out / "x")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(DataError, match=r"bad\.jsonl:2: invalid JSON"):
        run(tokenizer, bad, out / "x", workers=workers)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_skipped_records_are_named_and_counted(tokenizer, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(BAD_LINES))
    stream = io.StringIO()
    settings = PreprocessSettings((str(bad),), str(tokenizer), str(tmp_path / "x"), on_error="skip")
    summary = preprocess(settings, Progress(stream))[str(tmp_path / "x")]
    assert documents(tmp_path / "x", tokenizer) == ["good", "also good"]
    assert (summary.documents, summary.skipped_records, summary.empty_documents) == (2, 2, 1)
    shown = stream.getvalue()
    assert f"skipped {bad}:2: invalid JSON" in shown and f"skipped {bad}:3: missing field 'text'" in shown
    assert "2 documents (" in shown and ", 2 skipped\n" in shown


def test_other_json_key(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "hello", "text": 3}')
    run(tokenizer, tmp_path / "a.jsonl", tmp_path / "x", json_key="body")
    assert documents(tmp_path / "x", tokenizer) == ["hello"]


def test_nothing_to_write(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"x: got none of the 0 documents of 1 files \(1 empty, 0 skipped\)"):
        run(tokenizer, tmp_path / "a.txt", tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []


def test_empty_validation_split(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "in" / "a.jsonl", ["only one"])
    with pytest.raises(DataError, match=r"x_validation: got none of the 1 documents"):
        run(tokenizer, path, tmp_path / "out" / "x", validation_fraction=1e-9)
    assert list((tmp_path / "out").iterdir()) == []


def test_foreign_json_is_not_overwritten(tokenizer, corpus, tmp_path):
    prefix = tmp_path / "tokenizer"
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    with pytest.raises(DataError, match=r"tokenizer\.json: would be overwritten"):
        run(tokenizer, corpus, prefix)
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_output_folder_is_a_file(tokenizer, corpus, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="out: the output folder cannot be made"):
        run(tokenizer, corpus, tmp_path / "out" / "x")


def test_full_disk_is_one_message_and_leaves_nothing(tokenizer, corpus, tmp_path, monkeypatch):
    def no_space(self, ids) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_tf.data.indexed.IndexedWriter.add_document", no_space)
    with pytest.raises(DataError, match="out/x: No space left on device. Free space"):
        run(tokenizer, corpus, tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("validation_fraction", 1.0, r"validation fraction is 1\.0.*\[0, 1\)"),
        ("workers", 0, "workers is 0.*at least 1"),
    ],
)
def test_options_out_of_range(tokenizer, corpus, tmp_path, option, value, message):
    with pytest.raises(DataError, match=message):
        run(tokenizer, corpus, tmp_path / "x", **{option: value})


def test_progress_shows_rates_of_an_injected_clock():
    now = [0.0]
    stream = io.StringIO()
    progress = Progress(stream, clock=lambda: now[0])
    two = np.array([1_500_000, 500_000])
    batch = EncodedBatch(np.zeros(6, np.int32), np.array([4, 2]), two, np.zeros(2, bool), 0, [("f", 1, "why")])
    now[0] = 9.0
    progress.advance(batch)
    assert stream.getvalue() == ""
    now[0] = 20.0
    progress.advance(batch)
    assert stream.getvalue() == "4 documents (0/s), 4.0 MB (0.20 MB/s), 12 tokens (1/s), 2 skipped\n"
