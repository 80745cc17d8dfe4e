from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tf.errors import ConfigError, UserError
from megatron_tf.telemetry.plot import plot_runs, read_run, starts

PROJECT = Path(__file__).parents[2]


def write_run(folder: Path, steps: range, tokens_before: int = 0, growth: bool = False) -> Path:
    folder.mkdir()
    lines = [{"step": steps[0], "tokens": tokens_before, "eval/loss": 9.0}]
    lines += [{"step": s, "tokens": tokens_before + 100 * s, "train/loss": 9.0 / (1 + s)} for s in steps[1:]]
    lines.append({"step": steps[-1], "tokens": tokens_before + 100 * steps[-1], "train/loss": None, "eval/loss": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = {"from": "runs/small", "method": "zero_key"} if growth else None
    (folder / "config.yml").write_text(json.dumps({"run": {"dir": str(folder)}, "growth": section}))
    return folder


@pytest.fixture
def chain(tmp_path):
    first = write_run(tmp_path / "small", range(5))
    return [first, write_run(tmp_path / "grown", range(4), tokens_before=400, growth=True)]


def test_points_leave_out_what_was_not_a_number(chain):
    run = read_run(chain[0])
    assert (run.name, run.grown) == ("small", False)
    assert run.points("train/loss", "tokens") == ([100, 200, 300, 400], [4.5, 3.0, 2.25, 1.8])
    assert run.points("eval/loss", "steps") == ([0, 4], [9.0, 2.0])


def test_a_grown_run_goes_on_where_the_one_before_ended(chain, tmp_path):
    third = write_run(tmp_path / "bigger", range(3), tokens_before=700, growth=True)
    runs = [read_run(folder) for folder in (*chain, third)]
    assert [run.grown for run in runs] == [False, True, True]
    assert starts(runs, "steps") == [0, 4, 7]
    assert starts(runs, "tokens") == [0, 0, 0]  # counted from the first stage on


def test_runs_that_were_not_grown_are_laid_over_each_other(chain, tmp_path):
    other = write_run(tmp_path / "other", range(5))
    assert starts([read_run(chain[0]), read_run(other)], "steps") == [0, 0]


def test_growth_is_marked_where_the_grown_run_begins(chain, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    marks = []
    monkeypatch.setattr(axes, "axvline", lambda self, x, **style: marks.append(x))
    runs = [read_run(folder) for folder in chain]
    plot_runs(runs, tmp_path / "tokens.png", "tokens")
    plot_runs(runs, tmp_path / "steps.png", "steps")
    assert marks == [400, 4]


def test_a_line_that_is_being_written_is_left_out(chain):
    with (chain[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tok')
    assert read_run(chain[0]).records[-1]["step"] == 4


@pytest.mark.parametrize("line", ["{", "[]", '{"step": 1}', '{"step": 1, "tokens": null}'])
def test_a_broken_record_is_named(chain, line):
    path = chain[0] / "metrics.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 has no step and tokens"):
        read_run(chain[0])


def test_folders_that_hold_no_run(tmp_path, chain):
    with pytest.raises(UserError, match=r"nowhere is no readable run folder.*run\.dir"):
        read_run(tmp_path / "nowhere")
    (chain[0] / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no record yet"):
        read_run(chain[0])
    (chain[1] / "config.yml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yml: not a plain YAML document"):
        read_run(chain[1])


def test_output_that_cannot_be_drawn(chain, tmp_path):
    runs = [read_run(chain[0])]
    for name in ("loss", "loss.xyz"):
        with pytest.raises(UserError, match=r"Choose \.png"):
            plot_runs(runs, tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        plot_runs(runs, tmp_path / "file" / "loss.png")


def test_missing_matplotlib_names_the_extra(chain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"needs matplotlib.*\[plot\]"):
        plot_runs([read_run(chain[0])], tmp_path / "loss.png")


def plot(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/plot_run.py", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, env=None, text=True, capture_output=True, timeout=100)


def test_command(chain, tmp_path):
    picture = tmp_path / "pictures" / "loss.png"
    done = plot(*chain, "--output", picture, "--x", "steps")
    assert (done.returncode, done.stdout) == (0, f"{picture}\n"), done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_reports_a_mistake_in_one_line(tmp_path):
    done = plot(tmp_path, "--output", tmp_path / "loss.png")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "loss.png").exists()
