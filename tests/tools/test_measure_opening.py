"""The table of opening costs, and what it refuses."""

from __future__ import annotations

from tooling import assert_refused, tool


def test_a_row_a_size(tmp_path):
    done = tool("measure_opening", "--documents", 100000, "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and lines[2].startswith("| 1e+05 | 3e+07 | 0.00 GB |") and lines[2].count("|") == 8


def test_refusals(tmp_path):
    short = tool("measure_opening", "--documents", 1, "--seq-length", 5000, "--folder", tmp_path)
    assert_refused(short, "has 300 tokens, one sample needs 5001")
    nowhere = tool("measure_opening", "--documents", 10, "--folder", tmp_path / "none")
    assert_refused(nowhere, f"{tmp_path / 'none'}: No such file or directory. Choose a folder")
