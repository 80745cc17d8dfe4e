"""Files are known by what is in them, and are named when they are something else than text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile
from pathlib import Path

import pytest

from megatron_tf.data.preparation.contents import Content, content_of

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"one"))
    return out.getvalue()


def zip_archive() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return out.getvalue()


def database(folder: Path) -> bytes:
    connection = sqlite3.connect(folder / "x.db")
    connection.execute("create table documents(text)")
    connection.commit()
    connection.close()
    return (folder / "x.db").read_bytes()


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSONL", "a.json", "a.b.jl", "a.jsonlines",
                                  "c4.00000-of-01024.json"])  # fmt: skip
def test_names_of_json_lines(name):
    assert content_of(LINES, name) == content_of(b"", name) == Content("lines")


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.text"])
def test_names_of_text(name):
    assert content_of(b"one", name) == content_of(b'{"text": "one"}', name) == Content("text")


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl", "a.txt", "blob", "a.tar", "a.zst"])
def test_what_is_packed_is_known_whatever_its_name(name):
    packed = {".gz": gzip.compress(LINES), ".bz2": bz2.compress(LINES), ".xz": lzma.compress(LINES)}
    packed |= {".zst": b"\x28\xb5\x2f\xfd\x20\x04!\0\0text"}
    for suffix, content in packed.items():
        assert content_of(content, name) == Content("compressed", suffix)
    assert content_of(bz2.compress(b""), name) == Content("compressed", ".bz2")
    assert content_of(b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + packed[".zst"], name) == Content("compressed", ".zst")
    assert content_of(tar(), name) == Content("archive")
    assert content_of(b"PAR1\x15\x00\x15\x10", name) == Content("parquet")


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.json.gz", ".gz"), ("a.jsonl.GZ", ".gz"), ("a.jsonl.zstd", ".zst"), ("a.txt.bz2", ".bz2"), ("a.tgz", ".gz"),
        ("a.tbz2", ".bz2"), ("a.txz", ".xz"), ("a.tzst", ".zst"),
    ],
)  # fmt: skip
def test_names_of_compressed_files(name, suffix):
    """Where the first bytes are missing or damaged, so that the damage is named."""
    assert content_of(b"", name) == content_of(b"\x01\x02\xff\xff", name) == Content("compressed", suffix)


def test_text_that_a_server_has_unpacked_already():
    assert content_of(LINES, "a.json.gz") == Content("lines") and content_of(b"one", "a.txt.xz") == Content("text")


def test_json_lines_without_an_ending():
    for content in (LINES, b"\xef\xbb\xbf\r\n " + LINES):
        assert content_of(content, "0123abcd") == Content("lines")


FOREIGN = {
    "a zip archive: unpack it first": lambda folder: zip_archive(),
    "an SQLite database: save it as .jsonl or .parquet": database,
    "a Python pickle": lambda folder: pickle.dumps(["one"]),
    "an Arrow IPC (Feather) file": lambda folder: b"ARROW1\0\0\xff\xff\xff\xff",
    "an Arrow IPC stream, as Hugging Face datasets keeps it": lambda folder: b"\xff\xff\xff\xff\x98\0\0\0",
    "an LZ4 file": lambda folder: b"\x04\x22\x4d\x18\x64\x40\xa7\0",
    "a PDF document": lambda folder: b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n",
    "an index of token files: these are prepared already": lambda folder: b"MMIDIDX\0\0\1\0",
    "a Git LFS pointer, not the file itself: run git lfs pull": lambda folder: (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 5\n"
    ),
    "UTF-16 text: convert it to UTF-8: iconv -f UTF-16 -t": lambda folder: LINES.decode().encode("utf-16"),
    "UTF-16 text: convert it to UTF-8: iconv -f UTF-16LE": lambda folder: "größer".encode("utf-16-le"),
    "UTF-16 text: convert it to UTF-8: iconv -f UTF-16BE": lambda folder: "größer".encode("utf-16-be"),
    "UTF-32 text": lambda folder: "one".encode("utf-32"),
    "an AppleDouble file": lambda folder: b"\0\5\x16\7\0\2\0\0Mac OS X",
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json.gz", "a.parquet", "blob"])
def test_something_else_is_named(tmp_path, what, name):
    kind, detail = content_of(FOREIGN[what](tmp_path), name)
    assert kind == "unknown" and f"is {what}" in detail


@pytest.mark.parametrize("head", [b"<!DOCTYPE html><title>404", b"\n <HTML>", b"<?xml version='1.0'?><Error>"])
def test_an_answer_of_a_server_in_the_place_of_json(head):
    for name in ("a.jsonl", "a.json.gz", "a.parquet", "blob"):
        kind, detail = content_of(head, name)
        assert kind == "unknown" and "as servers send it in the place of a file: download it again" in detail
    assert content_of(head, "a.txt") == Content("text"), "it may be what the user wants to train on"


@pytest.mark.parametrize(
    "text", ["ORCHIDS", "PARENTS", "PAR1SH", "BZh9", "%PDF-", "Rar!", "LZIP", "ユニコード", "a\x0c\x1b["]
)
def test_words_are_not_taken_for_signatures(text):
    assert content_of(text.encode(), "a.txt") == Content("text")


def test_a_character_that_the_beginning_cuts_in_two():
    assert content_of("größer".encode()[:3], "a.txt") == Content("text")
