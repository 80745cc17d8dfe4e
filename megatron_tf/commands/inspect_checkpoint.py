"""What is inside a checkpoint; are its bytes right; how does it differ from another one.

Reads the index only, and with --verify or --diff the shards through a bounded buffer: a laptop is enough for
any size. Exit code 0; 1 when --diff finds a difference; 2 when a checkpoint is missing or damaged, with --verify
also when that is a newer one of the folder. Damage of the weights themselves is told from a difference by --verify
alone, which reads both checkpoints once more.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tf.arguments import path
from megatron_tf.errors import CheckpointError, printable
from megatron_tf.telemetry.text import bullets, table

if TYPE_CHECKING:
    from megatron_tf.checkpoint.compare import StateDifference
    from megatron_tf.checkpoint.reader import CheckpointReader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "path", type=path, help="a checkpoint, or a checkpoints or run folder (its newest complete one)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare the checksum of every file with the manifest, also of OTHER"
    )
    parser.add_argument(
        "--diff",
        type=path,
        metavar="OTHER",
        help="compare with another checkpoint, tensor by tensor; checksums only with --verify",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    arguments = parser.parse_args()
    from megatron_tf.checkpoint.compare import compare
    from megatron_tf.checkpoint.manager import find_checkpoint
    from megatron_tf.checkpoint.reader import open_checkpoint
    from megatron_tf.checkpoint.summary import summarize

    found, passed_over = find_checkpoint(arguments.path)
    reader = open_checkpoint(found)
    summary = summarize(reader)
    if arguments.verify:
        reader.verify()
        summary["verified_files"] = len(reader.manifest.files)
    differences = None
    if arguments.diff:
        found, more = find_checkpoint(arguments.diff)
        other = open_checkpoint(found)
        passed_over += more
        if arguments.verify:
            other.verify()
        differences = [d for d in compare(reader, other) if not d.equal]
        # NaN and infinity have no JSON form
        summary["differences"] = [
            {**vars(d), "largest": d.largest if math.isfinite(d.largest) else str(d.largest)} for d in differences
        ]
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        print_summary(reader, summary)
        if differences is not None:
            print_differences(arguments.diff, differences)
    if arguments.verify and passed_over:
        raise CheckpointError(
            f"newer checkpoints are damaged:{bullets(passed_over)}\nCopy them again, or move them away"
        )
    if differences:
        sys.exit(1)


def print_summary(reader: CheckpointReader, summary: dict[str, Any]) -> None:
    print(f"{summary['path']} (format {summary['format_version']}, {summary['bytes']:,} bytes)")
    of_model = [(key, str(value)) for key, value in summary["model"].items() if value is not None]
    print_table(of_model, title="model")
    progress = [(key, f"{summary[key]:,}") for key in ("step", "samples", "tokens", "parameters")]
    print_table(progress, title="progress")
    if summary["scales"]:
        scales = [(kind, ", ".join(f"{s:.6g}" for s in values)) for kind, values in summary["scales"].items()]
        print_table(scales, title="τ")
    for number, entry in enumerate(summary["growth_history"], 1):
        print_table([(key, str(value)) for key, value in entry.items()], title=f"growth {number}")
    for event in summary["run"].get("history", ()):
        changes = [(key, f"{old} -> {new}") for key, (old, new) in event.get("changes", {}).items()]
        of_event = [(key, str(event[key])) for key in ("tokens", "source") if event.get(key)]
        print_table([*of_event, *changes], title=f"{event.get('event')}, step {event.get('step')}")
    rows = [
        (name, str(tensor["shape"]), ", ".join(tensor["states"]), f"{tensor['bytes']:,}", tensor["adam_steps"])
        for name, tensor in summary["tensors"].items()
    ]
    print_table([("name", "shape", "states", "bytes", "updates"), *rows], title="tensors")
    if "verified_files" in summary:
        print(f"\nverified: {summary['verified_files']} files, every checksum and range is right")


def print_differences(other: Path, differences: Sequence[StateDifference]) -> None:
    if not differences:
        print(f"\nno difference to {other}: every tensor and state is equal to the last bit")
        return
    rows = [("name", "state", "shapes", "unequal of compared", "largest difference")]
    for d in differences:
        shapes = " / ".join("missing" if shape is None else str(list(shape)) for shape in d.shapes)
        rows.append((d.name, d.state, shapes, f"{d.unequal:,} of {d.compared:,}", f"{d.largest:.3g}"))
    print_table(rows, title=f"differences to {other}")


def print_table(rows: Iterable[Sequence[str]], title: str) -> None:
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = table(cells, to_left=range(len(cells[0]))) if cells else ""
    print(f"\n{title}")
    for line in lines.splitlines():
        print(f"  {line}")
