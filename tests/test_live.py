"""Waiting for other processes, and reading what they are writing."""

from __future__ import annotations

import subprocess
import sys

import live
import pytest
from live import last_step, records, until


def test_a_record_counts_when_its_line_has_ended(tmp_path):
    lines = '{"step": 1, "note": "größer"}\n{"step": 2}\n'.encode()
    found = []
    for end in range(len(lines) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(lines[:end])
        found.append((len(records(tmp_path)), last_step(tmp_path)))
    first = lines.index(b"\n") + 1
    assert found == [(0, 0)] * first + [(1, 1)] * (len(lines) - first) + [(2, 2)]


def test_a_run_that_has_written_nothing_is_at_step_0(tmp_path):
    assert (records(tmp_path), last_step(tmp_path)) == ([], 0)


def test_what_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(live, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(AssertionError, match="waited 0 seconds in vain until it came"):
        until(lambda: False, "it came")
    until(lambda: True, "it came")


def test_a_process_that_ends_early_is_no_reason_to_wait():
    words = [sys.executable, "-S", "-c", "print('cannot'); raise SystemExit(3)"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    with pytest.raises(AssertionError, match="the process ended with 3 before it came\ncannot"):
        until(lambda: False, "it came", process)
    until(lambda: process.poll() is not None, "it ended", process)
