"""Reading documents: every input format, and every way in which a record can be bad."""

from __future__ import annotations

import json

import pytest

from megatron_tf.data.preparation.record_types import BadRecord, ReadLimits
from megatron_tf.data.preparation.records import is_one_document, parse_record, read_records, read_texts
from megatron_tf.errors import DataError

TEXTS = ["first", "second with ümlaut\u2028and\nlines", "x" * 700_000, "last"]


def jsonl(texts) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def test_blank_lines_are_counted_but_are_no_records(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "a"}\n  \n{"text": "b"}\n\n')
    assert [record.line for record in read_records([tmp_path / "a.jsonl"])] == [2, 4]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst"])
def test_inputs_that_cannot_be_read(tmp_path, name):
    """Gone, or no longer readable, after the files were listed."""
    with pytest.raises(DataError, match=rf"{name}: No such file or directory. Make it readable, or leave it out"):
        list(read_texts([tmp_path / name], "text"))


BAD_LINES = {
    "invalid": (b'{"text": ', "invalid JSON"),
    "deep": (b"[" * 100_000, "invalid JSON"),
    "not an object": (b'["text"]', "missing field 'text', it is no JSON object"),
    "missing": (b'{"body": "x", "a": 1}', "missing field 'text', its fields are a, body"),
    "not a string": (b'{"text": 5}', "field 'text' is of type int, not a string"),
    "null": (b'{"text": null}', "field 'text' is of type NoneType"),
    "not utf-8": (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
    "nested": (b'{"meta": {"text": "x"}}', "missing field 'text', .* that within 'meta' is not looked at: move it up"),
    "an object": (b'{"text": {"body": "x"}}', "field 'text' is of type object, not a string"),
    "twice": (b'{"text": "x", "text": "y"}', "field 'text' is there more than once"),
    "twice in disguise": (rb'{"text": "x", "te\u0078t": "y"}', "field 'text' is there more than once"),
    "NUL": (b'{"text": "x"}\0\0', r"invalid JSON .*; it has NUL characters, as files have that were cut off"),
    "carriage returns": (
        b'{"text": "x"}\r{"text": "y"}',
        r"invalid JSON .*; it has line ends of carriage returns alone",
    ),
    "an array of objects": (
        b'[{"text": "x"}]',
        r"missing field .*, it is no JSON object; write an array as one object a line",
    ),
    "several lines": (b"{", "invalid JSON .*; write each object in a line of its own"),
    "surrogate": (rb'{"text": "ab\ud800"}', "field 'text' has half a surrogate pair at character 2"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_lines(tmp_path, case):
    line, message = BAD_LINES[case]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {message}"):
        list(read_texts([tmp_path / "a.jsonl"], "text"))


UNUSUAL_LINES = {
    "escapes": (rb'{"text": "\u0041\/\ud83d\ude00\u0000"}', "A/😀\0"),
    "separators": ('{"text": "a\u2028b\u0085c"}'.encode(), "a\u2028b\u0085c"),
    "a long integer": (b'{"text": "a", "id": ' + b"7" * 6000 + b"}", "a"),
    "no numbers": (b'{"text": "a", "x": NaN, "y": -Infinity, "z": 1e999}', "a"),
    "another field twice": (b'{"text": "a", "x": 1, "x": 2, "y": {"text": 1, "text": 2}}', "a"),
    "a mark": (b"\xef\xbb\xbf" + b'{"text": "a"}', "a"),
    "a mark in the text": ('{"text": "\ufeffa"}'.encode(), "\ufeffa"),
    "white space": (b' \t{ "text" :\t"a" } \r', "a"),
    "a field with dots": (b'{"text": "a", "text.text": 1}', "a"),
}


@pytest.mark.parametrize("case", UNUSUAL_LINES)
def test_unusual_lines(tmp_path, case):
    line, text = UNUSUAL_LINES[case]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + line + b"\n\n" + line)
    assert list(read_texts([tmp_path / "a.jsonl"], "text")) == [text, text]


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b'{"text": "good"}\n'), ("a.txt", b"good")])
def test_a_byte_order_mark_is_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    assert list(read_texts([tmp_path / name], "text")) == ["good"]


@pytest.mark.parametrize(
    ("content", "single"),
    [
        ({"a.txt": "one"}, True),
        ({"a.txt": "one", "b.txt": "two"}, False),
        ({"a.txt": "", "b.jsonl": '{"text": ""}\n{"text": "one"}\n{"body": 1}'}, True),
        ({"a.jsonl": '{"text": "one"}\n{"text": "two"}\n' + "no JSON\n" * 10**6}, False),
        ({"a.txt": ""}, False),
    ],
)
def test_a_single_document_is_known(tmp_path, content, single):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert is_one_document(sorted(tmp_path.iterdir()), ReadLimits()) == single


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
