"""Reading documents: every input format, and every way in which a record can be bad."""

from __future__ import annotations

import json

import pytest

from megatron_tf.data import records
from megatron_tf.data.records import BadRecord, expand_inputs, parse_record, read_records, read_texts
from megatron_tf.errors import DataError

TEXTS = ["first", "second with ümlaut\u2028and\nlines", "x" * 700_000, "last"]


def jsonl(texts) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


@pytest.mark.parametrize("final_newline", [True, False])
@pytest.mark.parametrize("read_bytes", [7, 1 << 18])
def test_all_formats_give_the_same_texts(tmp_path, monkeypatch, final_newline, read_bytes):
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr(records, "READ_BYTES", read_bytes)
    content = jsonl(TEXTS) if final_newline else jsonl(TEXTS)[:-1]
    (tmp_path / "a.jsonl").write_bytes(content)
    middle = len(content) // 2
    frames = [zstandard.compress(part) for part in (content[:middle], b"", content[middle:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    for pattern in ("a.jsonl", "a.jsonl.zst", "?.txt"):
        assert list(read_texts(expand_inputs([str(tmp_path / pattern)]), "text")) == TEXTS


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


def test_input_of_unknown_kind(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.parquet: unknown kind of input. Known are \.txt, \.jsonl, \.jsonl\.zst"):
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


def test_text_file_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xfe")
    with pytest.raises(DataError, match=r"a\.txt:1: not UTF-8 at byte 3"):
        list(read_texts([tmp_path / "a.txt"], "text"))


@pytest.mark.parametrize("damage", ["truncated", "rubbish"])
def test_broken_zstandard_is_a_bad_record_after_the_good_ones(tmp_path, damage):
    zstandard = pytest.importorskip("zstandard")
    first = zstandard.compress(jsonl(["a", "b"]))
    second = {"truncated": zstandard.compress(jsonl(TEXTS))[:-3], "rubbish": b"this is no frame at all"}[damage]
    (tmp_path / "a.jsonl.zst").write_bytes(first + second)
    (tmp_path / "b.jsonl").write_bytes(jsonl(["next file"]))
    found = list(read_records([tmp_path / "a.jsonl.zst", tmp_path / "b.jsonl"]))
    assert [parse_record(record, "text") for record in (*found[:2], found[-1])] == ["a", "b", "next file"]
    with pytest.raises(BadRecord, match={"truncated": "truncated", "rubbish": "broken zstandard data"}[damage]):
        parse_record(found[-2], "text")
