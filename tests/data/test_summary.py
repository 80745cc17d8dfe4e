"""PREFIX.json: what is written comes back; nothing that is broken passes for missing."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import pytest

from megatron_tf.data.summary import FORMAT, CorpusSummary, check_replaceable, read_summary, write_summary
from megatron_tf.errors import DataError

SUMMARY = CorpusSummary(
    documents=3, tokens=50, bytes=120, max_token_id=49, tokenizer_fingerprint="f" * 64, vocab_size=50, eod_id=0,
    files=("a.txt", "b.txt"), skipped_records=0, empty_documents=1,
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    write_summary(tmp_path / "x", SUMMARY)
    return tmp_path / "x.json"


def test_it_comes_back(path):
    assert read_summary(path.with_suffix("")) == SUMMARY
    check_replaceable(path.with_suffix(""))


def test_data_of_other_writers_have_none(path):
    assert read_summary(path.with_name("other")) is None
    assert read_summary(path / "below_a_file") is None
    path.write_text(json.dumps({"version": "1.0", "model": {}}))
    assert read_summary(path.with_suffix("")) is None
    with pytest.raises(DataError, match=r"x\.json: would be overwritten"):
        check_replaceable(path.with_suffix(""))


WRONG = [
    ("documents", "3", "a number of 0 or more, below 2^63"),
    ("tokens", None, "a number of 0 or more, below 2^63"),
    ("tokens", 50.0, "a number of 0 or more, below 2^63"),
    ("max_token_id", True, "a number of 0 or more, below 2^63"),
    ("vocab_size", -1, "a number of 0 or more, below 2^63"),
    ("tokens", 2**63, "a number of 0 or more, below 2^63"),
    ("tokenizer_fingerprint", 5, "a string"),
    ("files", "a.txt", "a list of file names"),
    ("files", ["a.txt", 5], "a list of file names"),
]


@pytest.mark.parametrize(("name", "value", "kind"), WRONG)
def test_wrong_types(path, name, value, kind):
    path.write_text(json.dumps({"format": FORMAT, **asdict(SUMMARY), name: value}))
    with pytest.raises(DataError) as error:
        read_summary(path.with_suffix(""))
    assert str(error.value).startswith(f"{path}: {name} is {json.dumps(value)}, not {kind}. ")
    assert "prepare the data again" in str(error.value)


def test_missing_fields(path):
    path.write_text(json.dumps({"format": FORMAT, "documents": 3}))
    with pytest.raises(DataError, match=r"x\.json: lacks tokens, bytes, .*Prepare the data again"):
        read_summary(path.with_suffix(""))


@pytest.mark.parametrize("keep", [0, 1, 100])
def test_torn(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    for use in (read_summary, check_replaceable):
        with pytest.raises(DataError, match=rf"x\.json: has {keep} bytes that are no JSON .*prepare them again"):
            use(path.with_suffix(""))


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[" * 100_000], ids=["encoding", "deep"])
def test_other_rubbish(path, content):
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"has {len(content)} bytes that are no JSON"):
        read_summary(path.with_suffix(""))


def test_unreadable(path):
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"x\.json: Is a directory\. Make it readable, or move it away"):
        read_summary(path.with_suffix(""))


def test_a_fifo_is_not_waited_for(path):
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=r"x\.json: is a FIFO, where a file is expected\. Make it readable"):
        read_summary(path.with_suffix(""))


def test_a_link_that_leads_nowhere_is_not_taken_for_no_summary(path):
    path.unlink()
    path.symlink_to("gone.json")
    with pytest.raises(DataError, match=r"x\.json: is a link to gone\.json, and nothing is there"):
        read_summary(path.with_suffix(""))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_of_somebody_else(path):
    path.chmod(0)
    with pytest.raises(DataError, match=r"x\.json: Permission denied\. Make it readable"):
        read_summary(path.with_suffix(""))
