"""The demo corpus's command: what it refuses, and that nothing half-written stays."""

from __future__ import annotations

import pytest
from tooling import assert_refused, tool

from megatron_tf.corpora.corpus import LICENSE_NOTE


@pytest.mark.parametrize("megabytes", ["0", "-1", "nan", "inf"])
def test_sizes_that_are_none(tmp_path, megabytes):
    done = tool("build_demo_corpus", tmp_path / "out", "--max-megabytes", megabytes)
    assert_refused(done, f"--max-megabytes is {megabytes}. Choose a finite number above 0")
    assert not (tmp_path / "out").exists()


def test_a_size_beyond_all_there_is_takes_all_there_is(tmp_path):
    done = tool("build_demo_corpus", tmp_path, "--max-megabytes", "1e300")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
    assert (tmp_path / "train.jsonl.zst").stat().st_size > 300_000


def test_an_output_that_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("in the way")
    assert_refused(tool("build_demo_corpus", tmp_path / "out"), tmp_path / "out", "Choose another folder")
    assert_refused(tool("build_demo_corpus", tmp_path / ("x" * 300)), "File name too long")
    assert (tmp_path / "out").read_text() == "in the way"


@pytest.mark.parametrize("largest_file", [50, 100_000], ids=["at once", "in the middle"])
def test_a_full_disk_leaves_the_older_corpus(tmp_path, largest_file):
    older = {f"{name}": name.encode() for name in ("train.jsonl.zst", "validation.jsonl.zst", "LICENSE.txt")}
    older["LICENSE.txt"] = LICENSE_NOTE.format(version="3.x").encode()
    for name, content in older.items():
        (tmp_path / name).write_bytes(content)
    done = tool("build_demo_corpus", tmp_path, "--max-megabytes", "2", largest_file=largest_file)
    assert_refused(done, f"{tmp_path}: File too large. Allow larger files")
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert left.keys() == older.keys()
    assert left["train.jsonl.zst"] == older["train.jsonl.zst"]


@pytest.mark.parametrize("name", ["train.jsonl.zst", "validation.jsonl.zst", "LICENSE.txt"])
def test_files_from_elsewhere_are_not_written_over(tmp_path, name):
    (tmp_path / name).write_text("mine")
    assert_refused(tool("build_demo_corpus", tmp_path), f"{name}: is there, and is none of this corpus. Move it away")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
