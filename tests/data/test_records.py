"""Reading documents: every input format, and every way in which a record can be bad."""

from __future__ import annotations

import json

import pytest

from megatron_tf.data.record_types import BadRecord
from megatron_tf.data.records import expand_inputs, parse_record, read_records, read_texts
from megatron_tf.errors import DataError

TEXTS = ["first", "second with ümlaut\u2028and\nlines", "x" * 700_000, "last"]


def jsonl(texts) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def test_blank_lines_are_counted_but_are_no_records(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\n  \n{"text": "b"}\n\n')
    assert [record.line for record in read_records([tmp_path / "a.jsonl"])] == [2, 4]


def test_inputs_are_expanded_once_each(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "[x].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    patterns = [str(tmp_path / name) for name in ("b.txt", "[ab].txt", "**/*.txt", "[x].txt")]
    names = [str(path.relative_to(tmp_path)) for path in expand_inputs(patterns)]
    assert names == ["b.txt", "a.txt", "[x].txt", "sub/c.txt"]


@pytest.mark.parametrize(("name", "message"), [("no.txt", "no such file"), ("*.jsonl", "no such file")])
def test_inputs_that_match_nothing(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        expand_inputs([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300 + ".txt", "File name too long. Correct the path"),
        ("a\0b.txt", "can be no path. Correct the path"),
        ("folder.txt", "folder.txt: is no file. Name the files in a folder as a quoted glob"),
    ],
)
def test_inputs_that_cannot_be_files(tmp_path, name, message):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=message):
        expand_inputs([f"{tmp_path}/{name}"])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst"])
def test_inputs_that_cannot_be_read(tmp_path, name):
    """Gone, or no longer readable, after the files were listed."""
    with pytest.raises(DataError, match=rf"{name}: No such file or directory. Make it readable, or leave it out"):
        list(read_texts([tmp_path / name], "text"))


def test_input_of_unknown_kind(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.csv: unknown kind of input. Known are \.jsonl, \.txt, \.tar, .*\.parquet"):
        expand_inputs([str(tmp_path / "*")])


BAD_LINES = {
    "invalid": (b'{"text": ', "invalid JSON"),
    "deep": (b"[" * 100_000, "invalid JSON"),
    "not an object": (b'["text"]', "missing field 'text', it is no JSON object"),
    "missing": (b'{"body": "x", "a": 1}', "missing field 'text', its fields are a, body"),
    "not a string": (b'{"text": 5}', "field 'text' is of type int, not a string"),
    "null": (b'{"text": null}', "field 'text' is of type NoneType"),
    "not utf-8": (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    "surrogate": (rb'{"text": "ab\ud800"}', "field 'text' has half a surrogate pair at character 2"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines(tmp_path, case):
    line, message = BAD_LINES[case]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        list(read_texts([tmp_path / "a.jsonl"], "text"))


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b'{"text": "good"}\n'), ("a.txt", b"good")])
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert list(read_texts([tmp_path / name], "text")) == ["good"]


def test_text_file_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xfe")
    with pytest.raises(DataError, match=r"a\.txt:1: not UTF-8 at byte 3"):
        list(read_texts([tmp_path / "a.txt"], "text"))


@pytest.mark.parametrize("line", [b'{"text": ""}', b'{"text": "", "meta": 1}'])
def test_empty_documents_are_left_out_of_texts_and_bad_as_records(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}')
    assert list(read_texts([tmp_path / "a.jsonl"], "text")) == ["a", "b"]
    empty = list(read_records([tmp_path / "a.jsonl"]))[1]
    with pytest.raises(BadRecord) as problem:
        parse_record(empty, "text")
    assert problem.value.kind == "empty" and empty.line == 2
