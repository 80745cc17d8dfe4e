"""The output of every mode of the benchmark: rows of one kind, and the machine that they were measured on."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_tf.benchmark.device import machine
from megatron_tf.durable import write_atomically
from megatron_tf.errors import ConfigError, write_errors
from megatron_tf.telemetry.text import table as columns

_REMEDY = "Name another file with --json."
Row = Mapping[str, object]  # the columns are the keys of the first row


def table(rows: Sequence[Row]) -> str:
    """Numbers to three digits, right-aligned; the rest left-aligned."""
    names = list(rows[0])
    words = [number for number, name in enumerate(names) if not isinstance(rows[0][name], (int, float))]
    return columns([names, *([_cell(row[name]) for name in names] for row in rows)], to_left=words)


def check_json(path: Path) -> None:
    """ConfigError unless `path` can be written, before minutes of measuring; what is there stays as it is."""
    with write_errors(ConfigError, path, _REMEDY):
        target = path.resolve()
        existed = target.exists()
        target.open("a").close()
        if not existed:
            target.unlink()


def write_json(path: Path, mode: str, device: torch.device, rows: Sequence[Row]) -> None:
    """Rows, machine and command as one JSON object."""
    content = {"mode": mode, "command": sys.argv, "machine": machine(device), "rows": list(rows)}
    text = json.dumps(content, indent=2) + "\n"
    with write_errors(ConfigError, path, _REMEDY):
        target = path.resolve()
        if target.exists() and not target.is_file():  # a pipe or a device
            target.write_text(text, encoding="utf-8")
        else:
            write_atomically(target, text.encode())


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
