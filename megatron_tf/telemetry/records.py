"""The records of a run, read back from its metrics.jsonl."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_tf.durable import read_plain
from megatron_tf.errors import NOT_AS_WRITTEN, UserError, file_errors, shown
from megatron_tf.telemetry.line_file import whole_lines

RECORDS_NAME = "metrics.jsonl"
MOST_BYTES = 2**33
NEEDED = ("step", "tokens")
DIVERGED = "train/diverged"  # in the last record of a run that ended by diverging
NUMBERS = ("train/loss", "eval/loss", "flops", "perf/step_seconds", "perf/tokens_per_second")


def read_records(folder: Path) -> tuple[dict[str, Any], ...]:
    """The records of the run in `folder`, even while they are being written, or after a crash that tore the last line.

    UserError, with file and line, when there is no such file or a record is not as a run writes it.
    """
    path = folder / RECORDS_NAME
    with file_errors(UserError, path, "Name the run.dir of a run."):
        content = read_plain(path, MOST_BYTES)
    return tuple(_record(line, f"{path}:{number}") for number, line in enumerate(whole_lines(content), start=1))


def _record(line: bytes, place: str) -> dict[str, Any]:
    """A logged record. UserError unless it has the `NEEDED` numbers, and numbers or null wherever it has `NUMBERS`."""
    try:
        record = json.loads(line)
        bad = [key for key in NEEDED if not _is_number(record[key])]
        bad += [key for key in NUMBERS if record.get(key) is not None and not _is_number(record[key])]
    except NOT_AS_WRITTEN:
        raise UserError(f"{place}: has no step and tokens: {line[:40]!r}. Correct or delete the line.") from None
    if bad:
        raise UserError(f"{place}: {bad[0]} is {shown(record[bad[0]])}, not a number. Correct or delete the line.")
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
