"""The tokenizer's command: what it refuses, and that nothing half-written stays."""

from __future__ import annotations

import pytest
from tooling import assert_refused, tool


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("the cat sat on the mat " * 20)
    return path


BAD = {
    "no vocabulary": (["--vocab-size", "0"], "vocabulary size is 0, bytes alone need 257"),
    "negative": (["--vocab-size", "-5"], "vocabulary size is -5"),
    "absurd": (["--vocab-size", str(10**12)], "vocabulary size is 1000000000000, at most 1048576"),
    "an input": (["--output", "{folder}/in.txt"], "in.txt: a tokenizer is recognised by the ending .json"),
    "a folder": (["--output", "{folder}/folder.json"], "folder.json: is a folder"),
    "below a file": (["--output", "{folder}/in.txt/t.json"], "in.txt: ", "Choose another folder"),
    "name too long": (["--output", "{folder}/" + "x" * 300 + ".json"], "File name too long. Choose another output"),
    "input is a folder": (["--input", "{folder}/folder.json"], "folder.json: is no file"),
    "input name too long": (["--input", "{folder}/" + "x" * 300 + ".txt"], "File name too long. Correct the path"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values(text, tmp_path, case):
    (tmp_path / "folder.json").mkdir()
    arguments, *fragments = BAD[case]
    before = text.read_bytes()
    done = tool(
        "train_tokenizer", "--input", text, "--output", tmp_path / "t.json",
        *(argument.format(folder=tmp_path) for argument in arguments),
    )  # fmt: skip
    assert_refused(done, *fragments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json", "in.txt"]
    assert text.read_bytes() == before


def test_a_full_disk_keeps_the_older_tokenizer(text, tmp_path):
    output = tmp_path / "t.json"
    arguments = ("--input", text, "--vocab-size", 300, "--output", output)
    assert_refused(tool("train_tokenizer", *arguments, largest_file=100), output, "File too large. Allow larger files")
    assert not output.exists()
    assert tool("train_tokenizer", *arguments).returncode == 0
    before = output.read_bytes()
    assert_refused(tool("train_tokenizer", *arguments, largest_file=100), output)
    assert output.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
