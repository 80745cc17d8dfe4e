"""Text to token files: what is written, for any number of workers, and what happens to bad input."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from preparing import TEXTS, documents, run, shards, token_files, write_jsonl

from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.preparation.lanes import share_workers
from megatron_tf.data.preparation.preprocess import PreprocessSettings, preprocess
from megatron_tf.data.preparation.progress import ProgressDisplay
from megatron_tf.data.preparation.split import is_held_out
from megatron_tf.data.summary import CorpusSummary, read_summary
from megatron_tf.errors import DataError, UserError


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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x.bin", "x.idx", "x.json", "x.report.json"]


def test_workers_do_not_change_the_output(tokenizer, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "megatron_tf.data.preparation.part_writer.BATCH_DOCUMENTS", 50
    )  # more batches than may be under way at once
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
        run(tokenizer, bad, out / "x", workers=workers, replace=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_skipped_records_are_named_and_counted(tokenizer, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(BAD_LINES))
    stream = io.StringIO()
    settings = PreprocessSettings((str(bad),), str(tokenizer), str(tmp_path / "x"), on_error="skip")
    summary = preprocess(settings, ProgressDisplay(stream))[str(tmp_path / "x")]
    assert documents(tmp_path / "x", tokenizer) == ["good", "also good"]
    assert (summary.documents, summary.skipped_records, summary.empty_documents) == (2, 2, 1)
    shown = stream.getvalue()
    assert f"skipped {bad}:2: invalid JSON" in shown and f"skipped {bad}:3: missing field 'text'" in shown
    assert "2 documents (" in shown and ", 3 skipped\n" in shown


def test_other_json_key(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "hello", "text": 3}')
    run(tokenizer, tmp_path / "a.jsonl", tmp_path / "x", json_key="body")
    assert documents(tmp_path / "x", tokenizer) == ["hello"]


def test_nothing_to_write(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"x: got none of 0 documents of 1 file \(1 empty, 0 skipped\)"):
        run(tokenizer, tmp_path / "a.txt", tmp_path / "out" / "x", on_error="skip")
    assert list((tmp_path / "out").iterdir()) == []


def test_empty_validation_split(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "in" / "a.jsonl", ["only one"])
    with pytest.raises(DataError, match=r"x_validation: got none of 1 document"):
        run(tokenizer, path, tmp_path / "out" / "x", validation_fraction=1e-9, split_by="documents")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["my.txt", "my.TXT.gz", "my.jsonl"])
def test_a_single_document_is_split_by_blocks(tokenizer, tmp_path, name):
    text = "".join(TEXTS)
    content = json.dumps({"text": text}) if name.endswith("jsonl") else text
    (tmp_path / name).write_bytes(gzip.compress(content.encode()) if name.endswith("gz") else content.encode())
    stream = io.StringIO()
    settings = PreprocessSettings(
        (str(tmp_path / name),), str(tokenizer), str(tmp_path / "x"), validation_fraction=0.05, workers=2
    )
    summaries = preprocess(settings, ProgressDisplay(stream))
    assert f"{name}: holds one document, of which 5 % are held out, in blocks" in stream.getvalue()
    train, validation = (documents(tmp_path / f"x_{split}", tokenizer) for split in ("train", "validation"))
    assert len("".join(validation)) == pytest.approx(0.05 * len(text), rel=0.3)
    rest = text
    for held in validation:
        assert held in rest
        rest = rest.replace(held, "", 1)
    assert rest == "".join(train)
    assert sum(summary.bytes for summary in summaries.values()) == len(text)
    assert preprocess(settings, ProgressDisplay(io.StringIO())) == summaries, "done before"
    with pytest.raises(DataError, match="is there already"):
        preprocess(replace(settings, split_by="documents"), ProgressDisplay(stream))


def test_few_documents_are_split_when_it_is_asked_for(tokenizer, tmp_path):
    """By whole documents one side stays empty; the message says what to do."""
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("".join(TEXTS[number::2]))
    fraction = next(
        f for f in (0.01, 0.001, 1e-5) if not any(is_held_out("".join(TEXTS[n::2]).encode(), f) for n in (0, 1))
    )
    with pytest.raises(
        DataError, match=r"x_validation: got none of 2 documents .* each instead with --split-by blocks"
    ):
        run(tokenizer, tmp_path / "*.txt", tmp_path / "x", validation_fraction=fraction)
    summaries = run(tokenizer, tmp_path / "*.txt", tmp_path / "x", validation_fraction=fraction, split_by="blocks")
    assert summaries[f"{tmp_path}/x_validation"].documents == 2


def test_blocks_without_a_share_that_is_held_out(tokenizer, corpus, tmp_path):
    assert run(tokenizer, corpus, tmp_path / "x", split_by="blocks")[str(tmp_path / "x")].documents == 1500


def test_foreign_json_is_not_overwritten(tokenizer, corpus, tmp_path):
    prefix = tmp_path / "tokenizer"
    (tmp_path / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    with pytest.raises(DataError, match=r"tokenizer\.json: would be overwritten"):
        run(tokenizer, corpus, prefix)
    assert (tmp_path / "tokenizer.json").read_bytes() == tokenizer.read_bytes()


def test_output_folder_is_a_file(tokenizer, corpus, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out: File exists. Choose another folder"):
        run(tokenizer, corpus, tmp_path / "out" / "x")


def test_a_prefix_without_a_name(tokenizer, corpus, tmp_path):
    with pytest.raises(DataError, match="out/' ends without a name"):
        run(tokenizer, corpus, f"{tmp_path}/out/")


def test_a_torn_summary_is_not_overwritten(tokenizer, corpus, tmp_path):
    """It may be somebody else's file: only its owner can tell."""
    (tmp_path / "x.json").write_text('{"format": "meg')
    with pytest.raises(DataError, match=r"x\.json: has 15 bytes that are no JSON"):
        run(tokenizer, corpus, tmp_path / "x")
    assert (tmp_path / "x.json").read_text() == '{"format": "meg'


def test_full_disk_is_one_message_and_leaves_nothing(tokenizer, corpus, tmp_path, monkeypatch):
    def no_space(self, ids, lengths) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_tf.data.indexed.IndexedWriter.add_documents", no_space)
    with pytest.raises(DataError, match="out/x.parts: No space left on device. Free space.*finished parts are kept"):
        run(tokenizer, corpus, tmp_path / "out" / "x")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("validation_fraction", 1.0, r"--validation-fraction is 1\.0. Choose 0 or more, below 1"),
        ("workers", 0, "workers is 0.*at least 1"),
    ],
)
def test_options_out_of_range(tokenizer, corpus, tmp_path, option, value, message):
    with pytest.raises(DataError, match=message):
        run(tokenizer, corpus, tmp_path / "x", **{option: value})


def test_parquet_without_the_column_is_said_before_any_work(tokenizer, corpus, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": [["a"], ["b"]]}), tmp_path / "in" / "z.parquet")
    with pytest.raises(
        DataError, match=r"z\.parquet: column 'text' is of type list.* leave such files out with --on-er"
    ):
        run(tokenizer, tmp_path / "in" / "*", tmp_path / "out" / "x")
    assert not (tmp_path / "out").exists()
    run(tokenizer, tmp_path / "in" / "*", tmp_path / "out" / "x", on_error="skip")
    (sample,) = json.loads((tmp_path / "out" / "x.report.json").read_text())["samples"]
    assert sample["kind"] == "not_text" and "so that 2 rows cannot be read" in sample["reason"]


def test_the_report_says_what_was_left_out_and_why(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(BAD_LINES))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "fine"}\n' + b'{"text": "%s"}' % (b"x" * 500))
    (tmp_path / "c.txt").write_text("a text")
    settings = PreprocessSettings(
        tuple(str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.txt")), str(tokenizer), str(tmp_path / "x"),
        on_error="skip", max_document_bytes=300,
    )  # fmt: skip
    preprocess(settings, ProgressDisplay(io.StringIO()))
    report = json.loads((tmp_path / "x.report.json").read_text())
    kinds = {"invalid_json": 1, "missing_field": 1, "empty": 1, "not_utf8": 1, "too_long": 1}
    assert report["skipped"] == kinds and report["skipped_records"] == 5
    assert (report["documents"], report["bytes"]) == (4, len("good" + "also good" + "fine" + "a text"))
    dataset = IndexedDataset(tmp_path / "x")
    assert report["tokens"] == report["splits"][""]["tokens"] == dataset.num_tokens
    places = [(Path(item["file"]).name, item["line"], item["kind"]) for item in report["samples"]]
    assert places == [
        ("a.jsonl", 2, "invalid_json"), ("a.jsonl", 3, "missing_field"), ("a.jsonl", 4, "empty"),
        ("b.jsonl", 1, "not_utf8"), ("b.jsonl", 3, "too_long"),
    ]  # fmt: skip
    assert report["samples"][0]["excerpt"] == "{" and report["samples"][0]["reason"].startswith("invalid JSON")


@pytest.mark.parametrize("kind", BAD_LINES[1:4])
def test_every_kind_of_bad_record_stops_by_default(tokenizer, tmp_path, kind):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + kind)
    with pytest.raises(DataError, match=r"a\.jsonl:2: .*Correct or remove the record, or leave out what is bad with"):
        run(tokenizer, tmp_path / "a.jsonl", tmp_path / "x")


def test_a_missing_package_is_said_before_any_work(tokenizer, corpus, tmp_path, monkeypatch):
    (tmp_path / "in" / "z.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"z\.parquet: needs the package pyarrow"):
        run(tokenizer, tmp_path / "in" / "*", tmp_path / "out" / "x")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_said_before_any_work(tokenizer, corpus, tmp_path):
    corpus.chmod(0)
    with pytest.raises(DataError, match=r"corpus\.jsonl: Permission denied. Make it readable, or leave it out"):
        run(tokenizer, corpus, tmp_path / "out" / "x")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 9])
def test_lanes_do_not_change_the_output(tokenizer, tmp_path, workers):
    """Many files get a process each, a few get processes with helpers; 9 workers over 2 files are 2 lanes of 4."""
    inputs = shards(tmp_path / "in", 8 if workers == 2 else 2)
    run(tokenizer, inputs, tmp_path / "one", validation_fraction=0.2)
    stream = io.StringIO()
    settings = PreprocessSettings(
        (str(inputs),), str(tokenizer), str(tmp_path / "x"), workers=workers, validation_fraction=0.2
    )
    preprocess(settings, ProgressDisplay(stream))
    for ending in ("_train", "_validation"):
        assert token_files(tmp_path / f"x{ending}") == token_files(tmp_path / f"one{ending}")
    assert stream.getvalue().startswith("1500 documents (")


@pytest.mark.slow
def test_a_bad_record_ends_all_lanes(tokenizer, tmp_path):
    inputs = shards(tmp_path / "in", 8)
    (tmp_path / "in" / "0.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"0\.jsonl:1: invalid JSON"):
        run(tokenizer, inputs, tmp_path / "x", workers=2)
    summaries = run(tokenizer, inputs, tmp_path / "x", workers=2, on_error="skip")
    assert summaries[str(tmp_path / "x")].skipped_records == 1


def test_workers_are_shared_out():
    assert share_workers(1, 100) == (1, 1)
    assert share_workers(16, 64) == (16, 1)  # a process a file
    assert share_workers(16, 1) == (1, 16)
    assert share_workers(8, 20) == (1, 8)
    assert share_workers(64, 30) == (8, 8)
    assert share_workers(64, 3) == (3, 21)
    assert share_workers(4, 0) == (1, 4)
