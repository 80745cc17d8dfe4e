from __future__ import annotations

import json
from itertools import product

import pytest
from tooling import PROJECT, assert_refused, tool

TINY = PROJECT / "configs" / "tiny.yml"
# terabytes of ids: what would fit partly takes long to fill
HUGE_BATCH = ("training.global_batch_size=100000", "training.micro_batch_size=100000")
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
    kinds = [tuple(line.split()[:3]) for line in done.stdout.splitlines()[2:]]
    assert kinds == list(product(("direct", "gram"), ("keep", "recompute"), ("state", "activations", "peak")))


def test_mistakes_are_one_message():
    assert_refused(tool("benchmark", "memory", "missing.yml", "--device", "cpu"), "missing.yml")
    assert_refused(tool("benchmark", "communication", TINY, "--tensor", 3), "parallel.tensor", 3)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("communication", TINY, "--tensor", 1), ("--tensor", "Give more ranks")),
        (("scaling", TINY, "--tokens", "--lengths"), ("--tokens and --lengths", "Give one")),
        (("scaling", "configs/tiny_transformer.yml"), ("model.architecture transformer", "Give a tokenformer")),
        (("images", TINY), ("of the task language_model", "tokenformer of image_classification")),
        (("step", TINY, "training.precision=bf16"), ("training.precision=bf16", "a copy of the file")),
        (("pattention", "--positions", 5), ("--positions 5", "multiple")),
        (("step", TINY, "--samples", 1_000_000_000), ("row 1 does not fit", "samples")),
        (("pattention", "--tokens", 1_000_000_000, "--positions", 64, "--width", 1000), ("row 1 does not fit",)),
        (("memory", TINY, "model.seq_length=100000000", *HUGE_BATCH), ("row 1 does not fit",)),
    ],
)
def test_what_cannot_be_measured(arguments, fragments):
    assert_refused(tool("benchmark", *arguments), *fragments)


def test_configurations_of_one_name_are_told_apart(tmp_path):
    files = [tmp_path / name / "config.yml" for name in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text(TINY.read_text())
    sizes = ("--layers", 1, "--samples", 1, "--seq-length", 16, "--rounds", 1, "--dtypes", "fp32", "--device", "cpu")
    done = tool("benchmark", "step", *files, *sizes)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == list(map(str, files))
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["1.", "2."]


def test_the_output_may_be_a_link_to_what_is_not_there_yet(tmp_path):
    (tmp_path / "link.json").symlink_to("target.json")
    done = tool("benchmark", "pattention", *SMALL, "--json", tmp_path / "link.json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "link.json").is_symlink() and json.loads((tmp_path / "target.json").read_text())["rows"]


@pytest.mark.parametrize("name", ["no/speed.json", "."])
def test_the_output_is_looked_at_before_anything_is_measured(tmp_path, name):
    done = tool("benchmark", "pattention", *SMALL, "--json", tmp_path / name)
    assert_refused(done, tmp_path / name, "Name another file with --json.")
