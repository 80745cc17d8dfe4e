"""What is inside a checkpoint or an adapter's folder; are its bytes right; how does it differ from another one.

Reads the index only, and with --verify or --diff the shards through a bounded buffer: a laptop is enough for
any size. Exit code 0; 1 when --diff finds a difference; 2 when a checkpoint is missing or damaged, with --verify
also when that is a newer one of the folder. Damage of the weights themselves is told from a difference by --verify
alone, which reads both checkpoints once more. An adapter is small: it is read whole, and its checksum compared,
always.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tf.arguments import path
from megatron_tf.errors import CheckpointError, printable
from megatron_tf.telemetry.text import bullets, count_of, of_which_used, table

if TYPE_CHECKING:
    from megatron_tf.checkpoint.compare import Split, StateDifference
    from megatron_tf.checkpoint.format import CheckpointIndex
    from megatron_tf.checkpoint.reader import CheckpointReader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "path",
        type=path,
        help="a checkpoint, or a checkpoints or run folder (its newest complete one); an adapter, or a fine-tuning run",
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
    from megatron_tf.adapters.summary import adapter_folder
    from megatron_tf.checkpoint.compare import compare
    from megatron_tf.checkpoint.manager import find_checkpoint
    from megatron_tf.checkpoint.reader import open_checkpoint
    from megatron_tf.checkpoint.summary import summarize

    adapter = adapter_folder(arguments.path)
    if adapter is not None:
        return inspect_adapter(adapter, arguments.diff, arguments.json)
    for place in filter(None, (arguments.path, arguments.diff)):
        check_is_no_export(place)
    found, passed_over = find_checkpoint(arguments.path)
    reader = open_checkpoint(found)
    summary = summarize(reader)
    if arguments.verify:
        reader.verify()
        summary["verified_files"] = len(reader.manifest.files)
    differences: list[StateDifference] | None = None
    keys: list[tuple[str, Any, Any]] = []
    scales: dict[str, tuple[float | None, float | None]] = {}
    if arguments.diff:
        found, more = find_checkpoint(arguments.diff)
        other = open_checkpoint(found)
        passed_over += more
        if arguments.verify:
            other.verify()
        keys, split = between(reader.index, other.index)
        differences = [d for d in compare(reader, other, split) if not d.equal]
        scales = differing_scales(reader.index, other.index)
        summary["scale_differences"] = {name: list(pair) for name, pair in scales.items()}
        summary["model_differences"] = {key: [one, two] for key, one, two in keys}
        summary["differences"] = [as_json(d) for d in differences]
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        print_summary(reader, summary)
        if differences is not None:
            if keys:
                print_table([(f"model.{key}", f"{one} / {two}") for key, one, two in keys], title="models differ")
            if scales:
                rows = [(name, " / ".join(map(scale_in_words, pair))) for name, pair in scales.items()]
                print_table(rows, title="τ differ")
            print_differences(arguments.diff, differences, is_alike=not keys and not scales)
    if arguments.verify and passed_over:
        raise CheckpointError(
            f"newer checkpoints are damaged:{bullets(passed_over)}\nCopy them again, or move them away"
        )
    if differences or keys or scales:
        sys.exit(1)


def differing_scales(first: CheckpointIndex, second: CheckpointIndex) -> dict[str, tuple[float | None, float | None]]:
    """τ of each projection in both, where they differ; None where it has none."""
    pairs = {name: (first.scales.get(name), second.scales.get(name)) for name in {**first.scales, **second.scales}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def scale_in_words(scale: float | None) -> str:
    return "missing" if scale is None else f"{scale:.9g}"


def check_is_no_export(folder: Path) -> None:
    """CheckpointError for an exported model: its config.json already describes it."""
    from megatron_tf.checkpoint.kinds import holds_export

    if holds_export(folder):
        raise CheckpointError(
            f"{folder}: is an export, not a checkpoint. Its config.json says what it holds; `megatron_tf convert "
            f"from-hf {folder} --to RUN_DIR` makes a checkpoint of it"
        )


def inspect_adapter(folder: Path, diff: Path | None, as_object: bool) -> None:
    from megatron_tf.adapters.folder import read_adapter
    from megatron_tf.adapters.summary import adapter_folder, differences, differing_settings, summarize

    adapter = read_adapter(folder)
    summary = summarize(folder, adapter)
    found: list[StateDifference] = []
    if diff is not None:
        other = read_adapter(adapter_folder(diff) or diff)
        found = list(differences(adapter, other))
        summary["differences"] = [as_json(d) for d in found]
        summary["differing_settings"] = differing_settings(adapter, other)
    if as_object:
        print(json.dumps(summary, indent=2))
    else:
        print_adapter(summary)
        if diff is not None:
            settings = summary["differing_settings"].items()
            print_table([(key, f"{one} -> {other}") for key, (one, other) in settings], title="settings")
            print_differences(diff, found, is_alike=not settings)
    if found or summary.get("differing_settings"):
        sys.exit(1)


def print_adapter(summary: dict[str, Any]) -> None:
    from megatron_tf.adapters.summary import scale_text

    print(f"{summary['path']} (adapter, format {summary['format_version']}, {summary['bytes']:,} bytes)")
    tokens = f"{summary['num_tokens']:,} in each branch, {summary['frozen_tokens']:,} frozen"
    if "candidates" in summary:
        tokens += f"; of each slot one of {summary['candidates']} candidates of {summary['group_size']} is used"
    rows = [("at", ", ".join(summary["modules"])), ("tokens", tokens), ("parameters", f"{summary['parameters']:,}"),
            ("τ", scale_text(summary)), ("activation", summary["activation"]),
            ("checksum", summary["checksum"])]  # fmt: skip
    print_table(rows, title="adapter")
    print_table([(key, str(value)) for key, value in summary["base"].items()], title="base")
    for number, entry in enumerate(summary["history"], 1):
        print_table([(key, str(value)) for key, value in entry.items()], title=f"growth {number}")
    branches = [
        (name, "{} -> {}".format(*branch["widths"]), f"{branch['keys_rms']:.3g}", f"{branch['values_rms']:.3g}")
        for name, branch in summary["branches"].items()
    ]
    print_table([("module", "widths", "keys, rms", "values, rms"), *branches], title="branches")


def between(first: CheckpointIndex, second: CheckpointIndex) -> tuple[list[tuple[str, Any, Any]], Split]:
    """(keys in which the models differ with both values, what is a copy of what in one that is split from the other).

    Nothing is known of checkpoints that contradict their own model sections; they are to be looked at all the same.
    """
    from megatron_tf.checkpoint.architecture import stored_model
    from megatron_tf.checkpoint.compare import Split
    from megatron_tf.config.differences import differing
    from megatron_tf.growth.split import apart, copies

    try:
        models = stored_model(first), stored_model(second)
    except CheckpointError:
        return [], Split()
    forward = copies(*models)
    return list(differing(*models)), Split(forward or copies(*models[::-1]), bool(forward), apart(*models))


def as_json(difference: StateDifference) -> dict[str, Any]:
    """The difference as JSON values. NaN and infinity, which JSON does not have, become text."""
    largest = difference.largest
    return {**vars(difference), "largest": largest if math.isfinite(largest) else str(largest)}


def print_summary(reader: CheckpointReader, summary: dict[str, Any]) -> None:
    print(f"{summary['path']} (format {summary['format_version']}, {summary['bytes']:,} bytes)")
    of_model = [(key, as_text(value)) for key, value in summary["model"].items() if value is not None]
    print_table(of_model, title="model")
    progress = [(key, f"{summary[key]:,}") for key in ("step", "samples", "tokens")]
    count, used = summary["parameters"], summary["used_parameters"]
    own = ("parameters", f"{count:,}{'' if used is None else of_which_used(used, count)}")
    print_table([*progress, own], title="progress")
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
        print(f"\nverified: {count_of(summary['verified_files'], 'file')}, every checksum and range is right")


def as_text(value: object) -> str:
    """A value of a configuration, of a section without the keys that are null."""
    if not isinstance(value, Mapping):
        return str(value)
    return f"{{{', '.join(f'{key}: {as_text(own)}' for key, own in value.items() if own is not None)}}}"


def print_differences(other: Path, differences: Sequence[StateDifference], is_alike: bool) -> None:
    """`is_alike`: whether nothing but the tensors can differ."""
    if not differences:
        head = "no difference to" if is_alike else "but for the above there is no difference to"
        print(f"\n{head} {other}: every tensor and state is equal to the last bit")
        return
    rows = [("name", "state", "shapes", "unequal of compared", "largest difference")]
    for d in over_blocks(differences):
        shapes = " / ".join("missing" if shape is None else str(list(shape)) for shape in d.shapes)
        found = (f"{d.unequal:,} of {d.compared:,}", f"{d.largest:.3g}") if d.compared else ("not compared", "")
        rows.append((d.name, d.state, shapes, *found))
    print_table(rows, title=f"differences to {other}")


def over_blocks(differences: Sequence[StateDifference]) -> list[StateDifference]:
    """One difference for the blocks that have one of equal shapes: `blocks.0-11.ffn.key_tokens`.

    Numbers of elements are summed; the largest difference is that of all blocks, NaN before others.
    """
    from megatron_tf.state.parameters import in_layer, layer_of

    found: dict[tuple[object, ...], list[StateDifference]] = {}
    for d in differences:
        key = d.name if layer_of(d.name) is None else in_layer(d.name, 0)
        found.setdefault((key, d.state, d.shapes), []).append(d)
    summed = []
    for alike in found.values():
        first = alike[0]
        if len(alike) > 1:
            blocks = sorted(layer for d in alike if (layer := layer_of(d.name)) is not None)
            _, _, inside = first.name.split(".", 2)
            first = replace(
                first,
                name=f"blocks.{spans(blocks)}.{inside}",
                compared=sum(d.compared for d in alike),
                unequal=sum(d.unequal for d in alike),
                largest=max((d.largest for d in alike), key=lambda value: (math.isnan(value), value)),
            )
        summed.append(first)
    return summed


def spans(numbers: Sequence[int]) -> str:
    """Ascending whole numbers in words: `0-3,6`."""
    ends: list[list[int]] = []
    for number in numbers:
        if ends and number == ends[-1][1] + 1:
            ends[-1][1] = number
        else:
            ends.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in ends)


def print_table(rows: Iterable[Sequence[str]], title: str) -> None:
    cells = [[printable(cell) for cell in row] for row in rows]
    lines = table(cells, to_left=range(len(cells[0]))) if cells else ""
    print(f"\n{title}")
    for line in lines.splitlines():
        print(f"  {line}")
