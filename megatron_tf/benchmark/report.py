"""What every mode of the benchmark prints and writes: rows of one kind, and the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from megatron_tf.errors import ConfigError, file_errors

Row = Mapping[str, object]  # the columns are the keys of the first row


def machine(device: torch.device) -> dict[str, object]:
    """What figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def table(rows: Sequence[Row]) -> str:
    """Numbers to three digits, right-aligned; the rest left-aligned."""
    names = list(rows[0])
    lines = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    numeric = [isinstance(rows[0][name], (int, float)) for name in names]
    return "\n".join(
        "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(line, widths, numeric)).rstrip()
        for line in lines
    )


def write_json(path: Path, mode: str, device: torch.device, rows: Sequence[Row]) -> None:
    """Rows, machine and command as one JSON object."""
    content = {"mode": mode, "command": sys.argv, "machine": machine(device), "rows": list(rows)}
    with file_errors(ConfigError, path, "Name another file with --json."):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _processor() -> str:
    """The model's name; Python's own `platform.processor` is empty or only the architecture on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
