from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from datetime import datetime

import pytest
from live import PATIENCE_SECONDS

from megatron_tf.telemetry.console import Console, NoBar

STAMP = "2026-01-02 03:04:05  "


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def console(rank=0, log_path=None, output=None, errors=None) -> Console:
    return Console(
        rank=rank, log_path=log_path, output=output, errors=errors, now=lambda: datetime(2026, 1, 2, 3, 4, 5)
    )


def test_main_rank_writes_to_the_output_and_appends_to_the_log(tmp_path):
    log, output = tmp_path / "train.log", io.StringIO()
    log.write_text("of an earlier process\n")
    written = console(log_path=log, output=output)
    written.info("step 1  loss 2.5 τ [bold]")
    written.warning("slow disk")
    written.close()
    written.close()
    lines = f"{STAMP}step 1  loss 2.5 τ [bold]\n{STAMP}WARNING: slow disk\n"
    assert output.getvalue() == lines
    assert log.read_text(encoding="utf-8") == "of an earlier process\n" + lines


def test_lines_are_in_the_log_at_once(tmp_path):
    """What a killed run had said must be there."""
    written = console(log_path=tmp_path / "train.log", output=io.StringIO())
    written.info("step 1")
    assert (tmp_path / "train.log").read_text() == f"{STAMP}step 1\n"
    written.close()


def test_other_ranks_only_warn_and_leave_the_log_alone(tmp_path):
    output, errors = io.StringIO(), io.StringIO()
    written = console(rank=3, log_path=tmp_path / "train.log", output=output, errors=errors)
    written.info("step 1")
    written.warning("slow disk")
    assert (output.getvalue(), errors.getvalue()) == ("", f"{STAMP}[rank 3] WARNING: slow disk\n")
    assert not (tmp_path / "train.log").exists()


def test_a_log_that_cannot_be_opened_does_not_stop_the_run(tmp_path):
    output = io.StringIO()
    written = console(log_path=tmp_path / "missing" / "train.log", output=output)
    written.info("step 1")
    (tmp_path / "missing").mkdir()
    written.info("step 2")
    lines = output.getvalue().splitlines()
    assert lines[0] == f"{STAMP}step 1" and lines[2:] == [f"{STAMP}step 2"]
    assert "train.log: No such file or directory. Its lines are lost until it can be written" in lines[1]
    assert (tmp_path / "missing" / "train.log").read_text() == f"{STAMP}step 2\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_fills_up_is_reported_once():
    output = io.StringIO()
    written = console(log_path="/dev/full", output=output)
    written.info("step 1")
    written.info("step 2")
    written.close()
    assert output.getvalue().count("No space left on device. Its lines are lost") == 1
    assert output.getvalue().endswith(f"{STAMP}step 2\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_an_output_on_a_full_disk_does_not_stop_the_run(tmp_path):
    full = io.TextIOWrapper(io.FileIO("/dev/full", "w"), encoding="utf-8")
    for rank in (0, 1):
        written = console(rank, tmp_path / "train.log", output=full, errors=full)
        written.info("step 1")
        written.warning("slow disk")
    assert (tmp_path / "train.log").read_text() == f"{STAMP}step 1\n{STAMP}WARNING: slow disk\n"


def test_an_output_that_nobody_reads_does_not_end_the_run(tmp_path):
    """As in `launch/train.py CONFIG | head`, or when `tee` is killed: hours of training do not end for want of a
    reader."""
    reader, writer = os.pipe()
    output = os.fdopen(writer, "w")
    os.close(reader)
    written = console(log_path=tmp_path / "train.log", output=output)
    for step in (1, 2, 3):
        written.info(f"step {step}")
    output.close()  # nothing is left in it that would raise
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.removeprefix(STAMP) for line in lines] == [
        "WARNING: nobody reads the output any more; the run goes on", "step 1", "step 2", "step 3"
    ]  # fmt: skip


def test_an_output_that_lacks_a_character():
    raw = io.BytesIO()
    written = console(output=io.TextIOWrapper(raw, encoding="ascii"))
    written.info("τ held")
    assert raw.getvalue().decode() == f"{STAMP}\\u03c4 held\n"


def test_no_bar_where_there_is_no_terminal():
    output = io.StringIO()
    written = console(output=output)
    with written.progress(10, 0, "tiny") as bar:
        assert isinstance(bar, NoBar)
        bar.advance(1, "loss 2.5")
        written.info("step 1")
    assert output.getvalue() == f"{STAMP}step 1\n"
    with console(rank=1, output=Terminal()).progress(10, 0, "tiny") as bar:
        assert isinstance(bar, NoBar)


def test_a_bar_with_lines_above_it_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    output = Terminal()
    written = console(log_path=tmp_path / "train.log", output=output)
    long = "step 5  " + "x" * 300 + " [red]not markup[/red] :smile:"
    with written.progress(10, 4, "tiny") as bar:
        bar.advance(5, "loss 2.5")
        written.info(long)
    written.info("done")
    written.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert "5/10" in shown
    assert "loss 2.5" in shown
    assert f"{STAMP}{long}" in shown  # in one piece, as it is
    assert shown.rstrip().endswith("done")
    assert (tmp_path / "train.log").read_text() == f"{STAMP}{long}\n{STAMP}done\n"  # no bar, no colours


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with console(output=Terminal()).progress(10, 0, "tiny") as bar:
        assert isinstance(bar, NoBar)


QUIET = """
import logging
from megatron_tf.telemetry.console import quiet_libraries
quiet_libraries()
quiet_libraries()
logger = logging.getLogger("DeepSpeed")
assert len(logger.filters) == 1
logger.setLevel(logging.DEBUG)  # as deepspeed does when it is imported
logger.addHandler(logging.StreamHandler())
logger.info("chatter"), logger.warning("guess"), logger.error("broken")
"""


def test_quiet_libraries_lets_errors_through():
    """In a process of its own: it changes loggers and warning filters of the whole process."""
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "broken\n"
