"""Which files are read: every file once, whatever its names, and what is no file or no text refused by name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megatron_tf.data.preparation.inputs import expand_inputs
from megatron_tf.errors import DataError


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
        ("a\0b.txt", "cannot be a path. Correct the path"),
        ("folder.txt", "folder.txt: is no file, but a folder. Name the files in a folder as a quoted glob"),
    ],
)
def test_inputs_that_cannot_be_files(tmp_path, name, message):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=message):
        expand_inputs([f"{tmp_path}/{name}"])


def test_input_of_unknown_kind(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"a\.csv: unknown kind of file .*; known are \.jsonl, .*\.txt and \.tar, .*\.parquet"
    ):
        expand_inputs([str(tmp_path / "*")])


def names(folder: Path, *patterns: str) -> tuple[list[str], list[str]]:
    """(what `patterns` below `folder` give, what is said about it)."""
    notes: list[str] = []
    found = expand_inputs([f"{folder}/{pattern}" for pattern in patterns], notes.append)
    return [str(path.relative_to(folder)) for path in found], notes


@pytest.fixture
def linked(tmp_path) -> Path:
    """Two texts, to which many names lead: links to each, and to the folders, some of them in circles."""
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "a" / "one.txt").write_text("one")
    (tmp_path / "a" / "inner" / "two.txt").write_text("two")
    (tmp_path / "a" / "0.txt").symlink_to("one.txt")
    (tmp_path / "a" / "hard.txt").hardlink_to(tmp_path / "a" / "one.txt")
    for number in range(30):  # 2^40 names of each file, if all were followed
        (tmp_path / "a" / f"loop{number}").symlink_to(".")
    (tmp_path / "a" / "inner" / "up").symlink_to("..")
    (tmp_path / "b").symlink_to("a")
    return tmp_path


@pytest.mark.parametrize("pattern", ["**/*.txt", "a/**/*.txt", "**", "a/**", "**/*", "./a/../a/**/*.txt"])
def test_a_file_with_many_names_is_read_once(linked, pattern):
    found, notes = names(linked, pattern)
    assert [os.path.basename(name) for name in found] == ["hard.txt", "two.txt"]
    assert all("loop" not in name and "b/" not in name for name in found)
    assert len(notes) == 1 and notes[0].endswith("read once; the same of 1 other name")


def test_names_of_one_file_next_to_each_other(linked):
    patterns = ["a/one.txt", "a/../a/one.txt", "b/loop3/loop4/one.txt", "a/hard.txt", "b/*.txt", "a/inner/two.txt"]
    found, notes = names(linked, *patterns)
    assert (
        found == ["a/one.txt", "a/inner/two.txt"]
        and "b/loop3" not in notes[0]
        and "; the same of 5 other names" in notes[0]
    )


def test_links_to_folders_and_files_outside_are_followed(linked, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "three.txt").write_text("three")
    (linked / "a" / "elsewhere").symlink_to(other)
    (linked / "four.txt").symlink_to(other / "three.txt")
    assert names(linked, "a/inner/../elsewhere/*.txt")[0] == ["a/inner/../elsewhere/three.txt"]
    assert names(linked, "a/**/t*.txt")[0] == ["a/elsewhere/three.txt", "a/inner/two.txt"]
    assert names(linked, "*.txt")[0] == ["four.txt"]


def test_a_name_that_says_what_it_is_counts(tmp_path):
    """As in Hugging Face's cache, where names are links to blobs."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123abcd").write_text("one")
    (tmp_path / "snapshot.txt").symlink_to("blobs/0123abcd")
    assert names(tmp_path, "**/*")[0] == ["snapshot.txt"]


@pytest.mark.parametrize("pattern", ["*.txt", "b.txt", "**/*.txt", "*/x.txt", "b.txt/*"])
@pytest.mark.parametrize("target", ["gone", "b.txt"])
def test_links_that_lead_nowhere_are_refused_by_name(tmp_path, pattern, target):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").symlink_to(target)
    with pytest.raises(DataError, match=rf"{tmp_path}/b\.txt: is a link to {target}, "):
        names(tmp_path, pattern)


@pytest.mark.parametrize("pattern", ["*.txt", "b.txt", "**/*.txt"])
@pytest.mark.parametrize("kind", ["FIFO", "socket"])
def test_what_is_no_file_is_refused_by_name(tmp_path, monkeypatch, pattern, kind):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one")
    with socket.socket(socket.AF_UNIX) as server:
        os.mkfifo("b.txt") if kind == "FIFO" else server.bind("b.txt")
        with pytest.raises(DataError, match=r"^b\.txt: is no file, but a FIFO, a socket or a device"):
            expand_inputs([pattern])


@pytest.mark.parametrize("pattern", ["*.txt", "*", "*/", "b.txt/"])
def test_folders_that_a_glob_does_not_look_into_are_refused_by_name(tmp_path, pattern):
    """Spark writes folders of such names."""
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "b.txt" / "part-0.txt").write_text("one")
    with pytest.raises(DataError, match=r"b\.txt/?: is no file, but a folder.*'[^']*/b\.txt/\*\.jsonl'"):
        names(tmp_path, pattern)
    assert names(tmp_path, "**/*.txt")[0] == ["b.txt/part-0.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into everything")
def test_folders_that_cannot_be_looked_into_are_refused_by_name(tmp_path):
    (tmp_path / "b").mkdir(mode=0)
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match=f"{tmp_path}/b: Permission denied"):
        names(tmp_path, "**/*.txt")


def test_hidden_files_are_only_taken_when_they_are_named(tmp_path):
    for name in (".a.txt", "b.txt", ".c/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(tmp_path, "**/*.txt")[0] == ["b.txt"] and names(tmp_path, ".*.txt")[0] == [".a.txt"]


def test_all_files_that_are_something_else_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    (tmp_path / "b.jsonl").write_bytes(b"PK\x03\x04\x14\0")
    (tmp_path / "c.json.gz").write_text("<html>404")
    with pytest.raises(
        DataError, match=r"b\.jsonl: is a zip archive: unpack it first.\n.*c\.json\.gz: is an HTML page"
    ):
        names(tmp_path, "*")
    for number in range(20):
        (tmp_path / f"d{number}.csv").write_text("text")
    with pytest.raises(DataError, match=r"\.\.\. and 12 more files\.$"):
        names(tmp_path, "*")
