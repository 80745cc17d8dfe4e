from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from megatron_tf.errors import ConfigError, UserError
from megatron_tf.telemetry import plot
from megatron_tf.telemetry.plot import plot_runs, read_run, starts


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


def test_the_legend_of_many_arms_covers_no_points(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(plot, "save_figure", lambda figure, output: figures.append(figure))
    plot.plot_ends(
        [plot.Ends(f"arm_{i}", 10 + i, 1e9 + i, (3.0, 2.0), hours=1.0) for i in range(43)], tmp_path / "a.png"
    )
    (figure,) = figures
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"arm_{i}" for i in range(43)]
    right = max(axes.get_window_extent().x1 for axes in figure.axes)
    place = legend.get_window_extent()
    assert place.x0 > right and place.x1 <= figure.bbox.x1 and place.y0 >= 0
    assert not any(axes.get_legend() for axes in figure.axes)


def test_a_line_that_is_being_written_is_left_out(chain):
    with (chain[0] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "tok')
    assert read_run(chain[0]).records[-1]["step"] == 4


def test_a_last_line_that_a_crash_tore_in_a_character_is_left_out(chain):
    with (chain[0] / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "tokens": 500, "note": "\xcf')
    assert read_run(chain[0]).records[-1]["step"] == 4


BROKEN = {
    "torn": ("{", "has no step and tokens: b'{'"),
    "list": ("[]", "has no step and tokens"),
    "number": ("5", "has no step and tokens"),
    "blank": ("", "has no step and tokens: b''"),
    "deep": ("[" * 100_000, "has no step and tokens"),
    "not UTF-8": ('{"step": 1, "tokens": 1, "note": "\udcff"}', "has no step and tokens"),
    "no tokens": ('{"step": 1}', "has no step and tokens"),
    "null": ('{"step": 1, "tokens": null}', "tokens is None, not a number"),
    "truth": ('{"step": true, "tokens": 1}', "step is True, not a number"),
    "nan": ('{"step": 1, "tokens": NaN}', "tokens is nan, not a number"),
    "beyond floats": ('{"step": 1, "tokens": 1' + "0" * 400 + "}", "tokens is 1000"),
    "loss": ('{"step": 1, "tokens": 1, "train/loss": "low"}', "train/loss is 'low', not a number"),
    "flops": ('{"step": 1, "tokens": 1, "flops": [[]]}', r"flops is \[\[\]\], not a number"),
    "speed": ('{"step": 1, "tokens": 1, "perf/step_seconds": "1"}', "perf/step_seconds is '1', not a number"),
    "endless": ('{"step": 1, "tokens": ' + "9" * 5000 + "}", "has no step and tokens"),
    "nested": (
        '{"step": 1, "tokens": ' + "[" * 900 + "]" * 900 + "}",
        r"tokens is \[\[\[\[\.\.\.\]\]\]\], not a number",
    ),
    "validation loss": ('{"step": 1, "tokens": 1, "eval/loss": [2]}', r"eval/loss is \[2\], not a number"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("place", [1, 7], ids=["first", "last"])
def test_a_broken_record_is_named(chain, case, place):
    line, message = BROKEN[case]
    path = chain[0] / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines.insert(place - 1, line.encode("utf-8", "surrogateescape"))
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    with pytest.raises(UserError, match=rf"metrics\.jsonl:{place}: {message}.*Correct or delete the line"):
        read_run(chain[0])


def test_a_run_with_a_name_that_is_no_text_and_would_be_a_formula(chain, tmp_path):
    pytest.importorskip("matplotlib")
    odd = chain[0].rename(tmp_path / os.fsdecode(b"a$\\oops$\xff"))
    plot_runs([read_run(odd)], tmp_path / "loss.PNG")
    assert (tmp_path / "loss.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_full_disk_leaves_no_picture(chain, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"loss\.png: No space left on device\. Free space"):
        plot_runs([read_run(chain[0])], tmp_path / "pictures" / "loss.png")
    assert list((tmp_path / "pictures").iterdir()) == []


def test_folders_that_hold_no_run(tmp_path, chain):
    with pytest.raises(UserError, match=r"nowhere/metrics\.jsonl: No such file or directory\. Name the run\.dir"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "metrics.jsonl").write_text('{"step": 1, "tokens": 1}\n')
    with pytest.raises(UserError, match=r"half/config\.yml: No such file or directory"):
        read_run(tmp_path / "half")
    (tmp_path / "half" / "config.yml").write_bytes(b"a: \xff")
    with pytest.raises(UserError, match=r"half/config\.yml: byte 3 is not UTF-8 text"):
        read_run(tmp_path / "half")
    (chain[0] / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no record yet"):
        read_run(chain[0])
    (chain[1] / "config.yml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yml: not a plain YAML document"):
        read_run(chain[1])


def test_only_files_are_read(chain):
    for name in ("metrics.jsonl", "config.yml"):
        (chain[0] / name).unlink()
        os.mkfifo(chain[0] / name)
        with pytest.raises(UserError, match=f"{name}: is a FIFO, where a file is expected"):
            read_run(chain[0])
        (chain[0] / name).unlink()
        (chain[0] / name).symlink_to("nowhere")
        with pytest.raises(UserError, match=f"{name}: is a link to nowhere, and nothing is there"):
            read_run(chain[0])
        (chain[0] / name).unlink()
        (chain[0] / name).symlink_to(chain[1] / name)


def test_output_that_cannot_be_drawn(chain, tmp_path):
    runs = [read_run(chain[0])]
    for name in ("loss", "loss.xyz"):
        with pytest.raises(UserError, match=r"Choose \.png"):
            plot_runs(runs, tmp_path / name)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: File exists. Choose another folder"):
        plot_runs(runs, tmp_path / "file" / "loss.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder\.png: is a folder"):
        plot_runs(runs, tmp_path / "folder.png")


def test_missing_matplotlib_names_the_extra(chain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"needs matplotlib.*\[plot\]"):
        plot_runs([read_run(chain[0])], tmp_path / "loss.png")
