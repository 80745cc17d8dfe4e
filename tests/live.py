"""Looking at what another process does while it lives: what it has written so far, and waiting until it has come far.

A reader may come in the middle of a write, and a loaded machine may be many times slower than a quiet one. So only
whole lines count, and a wait ends with what it waits for. Its patience is there to say what has not happened, and
proves nothing.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

# Below pytest's limit of a test, which could not say what was waited for.
PATIENCE_SECONDS = 300.0


def records(run: Path) -> list[dict]:
    """The records of metrics.jsonl of a run that may be writing it: all but a last line without its end."""
    path = run / "metrics.jsonl"
    whole, _, _ = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    return [json.loads(line) for line in whole.splitlines()]


def last_step(run: Path) -> int:
    """Of the newest whole record; 0 before the first."""
    return max((record["step"] for record in records(run)[-1:]), default=0)


def until(
    condition: Callable[[], object], what: str, process: subprocess.Popen | None = None, pause: float = 0.01
) -> None:
    """Waits until `condition`; fails with `what` when it does not come, or `process`, which is to bring it, ends.

    `pause`: seconds between two looks.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        # What a process has done by its end counts.
        if process is not None and process.poll() is not None and not condition():
            said = process.stdout.read() if process.stdout is not None else ""
            raise AssertionError(f"the process ended with {process.returncode} before {what}\n{said}")
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:g} seconds in vain until {what}"
        time.sleep(pause)
