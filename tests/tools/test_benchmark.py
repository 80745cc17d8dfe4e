from __future__ import annotations

import json

import pytest
from tooling import PROJECT, assert_refused, tool

TINY = PROJECT / "configs" / "tiny.yml"
SMALL = ("--tokens", 16, "--positions", 8, "--width", 8, "--dtypes", "fp32", "--rounds", 1, "--device", "cpu")


def test_table_and_json(tmp_path):
    done = tool("benchmark", "pattention", *SMALL, "--json", tmp_path / "speed.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["mode"] == "pattention" and written["machine"]["threads"] == 1 and "--width" in written["command"]
    (row,) = written["rows"]
    assert row["tokens"] == 16 and row["width"] == 8
    machine, names, values = done.stdout.splitlines()
    assert json.loads(machine) == written["machine"]
    assert names.split()[:2] == ["dtype", "tokens"] and values.split()[:2] == ["float32", "16"]


def test_memory_of_a_configuration():
    done = tool("benchmark", "memory", TINY, "model.seq_length=64", "model.num_layers=1", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["state", "activations", "peak"]


def test_mistakes_are_one_message():
    assert_refused(tool("benchmark", "memory", "missing.yml", "--device", "cpu"), "missing.yml")
    assert_refused(tool("benchmark", "communication", TINY, "--tensor", 3, "--device", "cpu"), "parallel.tensor", 3)


@pytest.mark.parametrize("name", ["no/speed.json", "."])
def test_the_output_is_looked_at_before_anything_is_measured(tmp_path, name):
    done = tool("benchmark", "pattention", *SMALL, "--json", tmp_path / name)
    assert_refused(done, tmp_path / name, "Name another file with --json.")
