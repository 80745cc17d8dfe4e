"""Lines on a disk that fails for a while: one warning, no gap beyond the failure, no torn line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from live import PATIENCE_SECONDS

from megatron_tf.telemetry.line_file import LineFile, whole_lines

PROJECT = Path(__file__).parents[2]


def test_lines_are_there_at_once_and_after_those_of_an_earlier_process(tmp_path):
    path = tmp_path / "a.log"
    path.write_text("old\n")
    file = LineFile(path, pytest.fail)
    file.append("τ \udcff")
    assert path.read_text() == "old\nτ \\udcff\n"
    file.append("two")
    assert path.read_text() == "old\nτ \\udcff\ntwo\n"


def test_only_what_fails_is_lost_and_each_failing_period_warned_of_once(tmp_path):
    folder, warnings = tmp_path / "run", []
    file = LineFile(folder / "a.log", warnings.append)
    for number in range(8):
        if number in (2, 6):
            folder.mkdir()
        if number == 4:
            folder.rename(tmp_path / "away")
        file.append(f"line {number}")
    assert (tmp_path / "away" / "a.log").read_text() == "line 2\nline 3\n"
    assert (folder / "a.log").read_text() == "line 6\nline 7\n"
    assert (
        warnings
        == [f"{folder}/a.log: No such file or directory. Its lines are lost until it can be written; the run goes on."]
        * 2
    )


def test_the_warning_may_go_to_the_very_file(tmp_path):
    warnings = []

    def warn(text):
        warnings.append(text)
        file.append(text)

    file = LineFile(tmp_path / "none" / "a.log", warn)
    file.append("line")
    assert len(warnings) == 1


def test_a_reader_gets_whole_lines(tmp_path):
    """Whatever moment of a write it comes in."""
    path = tmp_path / "a.jsonl"
    file = LineFile(path, pytest.fail)
    for text in ("one", "zwölf"):
        file.append(text)
    content = path.read_bytes()
    lines = [whole_lines(content[:end]) for end in range(len(content) + 1)]
    assert lines == [[]] * 4 + [[b"one"]] * 7 + [[b"one", "zwölf".encode()]]


FILLS_UP = """
import resource, sys
from pathlib import Path
from megatron_tf.telemetry.line_file import LineFile
warnings = []
file = LineFile(Path(sys.argv[1]), warnings.append)
file.append("a" * 50)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
file.append("b" * 80)  # half of it is written
torn = Path(sys.argv[1]).read_text()
file.append("c" * 80)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.append("d" * 50)
assert torn == "a" * 50 + "\\n" + "b" * 49, torn
assert Path(sys.argv[1]).read_text() == "a" * 50 + "\\n" + "d" * 50 + "\\n"
assert len(warnings) == 1 and "File too large" in warnings[0], warnings
"""


def test_a_line_that_a_full_disk_tore_is_cut_off_before_the_next(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", FILLS_UP, str(tmp_path / "a.log")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
