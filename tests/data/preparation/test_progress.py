"""What is shown while data are prepared, with and without a terminal."""

from __future__ import annotations

import io

from megatron_tf.data.preparation.progress import BAD_RECORDS_SHOWN, Advance, ProgressDisplay
from megatron_tf.data.preparation.record_types import BadSample


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_every_ten_seconds_of_an_injected_clock():
    now = [5.0]
    stream = io.StringIO()
    progress = ProgressDisplay(stream, clock=lambda: now[0])
    progress.start(100)
    now[0] = 14.0
    progress.advance(Advance(documents=2, text_bytes=2_000_000, tokens=6, input_bytes=40))
    assert stream.getvalue() == ""
    progress.bad_record(BadSample("empty", "f", 1, "why", ""))
    now[0] = 25.0
    progress.advance(Advance(documents=2, text_bytes=2_000_000, tokens=14, input_bytes=60))
    line = "4 documents (0/s), 4.0 MB (0.20 MB/s), 20 tokens (1/s), 1 skipped\n"
    assert stream.getvalue() == "skipped f:1: why\n" + line
    progress.stop()
    assert stream.getvalue() == "skipped f:1: why\n" + line + line


def test_millions_of_bad_records_do_not_fill_the_log():
    stream = io.StringIO()
    progress = ProgressDisplay(stream)
    for number in range(1000):
        progress.bad_record(BadSample("empty", "f", number, "why", ""))
    lines = stream.getvalue().splitlines()
    assert len(lines) == BAD_RECORDS_SHOWN + 1 and lines[-1] == "further bad records are counted in the report only"


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    progress = ProgressDisplay(stream)
    progress.start(200)
    progress.advance(Advance(documents=3, text_bytes=1, tokens=9, input_bytes=100))
    progress.note("[file] says")
    progress.stop()
    shown = stream.getvalue()
    assert "50%" in shown and "3 documents (" in shown and "MB/s" in shown and "[file] says" in shown


def test_nothing_done_shows_nothing():
    stream = io.StringIO()
    progress = ProgressDisplay(stream)
    progress.start(0)
    progress.stop()
    assert stream.getvalue() == ""
