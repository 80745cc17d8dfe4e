"""The picture's command."""

from __future__ import annotations

import json

import pytest
from tooling import assert_refused, tool


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yml").write_text("growth: null\n")
    records = [{"step": step, "tokens": 100 * step, "train/loss": 9.0 / step} for step in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_picture_in_a_new_folder(run, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "pictures" / "loss.png"
    done = tool("plot_run", run, run, "--output", picture, "--x", "steps")
    assert (done.returncode, done.stdout) == (0, f"{picture}\n"), done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_broken_record(run, tmp_path):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tok\n{"step": 5, "tok')
    assert_refused(tool("plot_run", run, "--output", tmp_path / "a.png"), f"{run}/metrics.jsonl:4: has no step")
    assert not (tmp_path / "a.png").exists()


def test_runs_that_are_none(tmp_path):
    for folder in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300)):
        done = tool("plot_run", folder, "--output", tmp_path / "a.png")
        assert_refused(done, f"{folder}/metrics.jsonl: ", "Name the run.dir of a run")


def test_outputs_that_cannot_be(run, tmp_path):
    pytest.importorskip("matplotlib")
    for output, message in (
        (run, "cannot be drawn"),
        (run / "config.yml", "cannot be drawn"),
        (run / "config.yml" / "a.png", "Choose another folder"),
        (tmp_path / ("x" * 300 + ".png"), "File name too long"),
    ):
        assert_refused(tool("plot_run", run, "--output", output), message)


def test_a_full_disk_leaves_no_picture(run, tmp_path):
    pytest.importorskip("matplotlib")
    done = tool("plot_run", run, "--output", tmp_path / "a.png", largest_file=1000)
    assert_refused(done, f"{tmp_path}/a.png: File too large. Allow larger files")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
