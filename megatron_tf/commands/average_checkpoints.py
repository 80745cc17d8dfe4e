"""Average the weights of checkpoints:
`python tools/average_checkpoints.py runs/124M --last 5 --to runs/124M_average`.

Of the newest checkpoints of one run, or of the checkpoints that are named; with --ema, the moving average in the newest
checkpoint of a run with optimizer.type adamw_ema. The result is step 0 of a run: evaluate, export,
grow or train it on; Adam's moments begin at 0. Needs no GPU, and memory for a few buffers whatever the size.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tf.arguments import path, whole_number
from megatron_tf.errors import UserError
from megatron_tf.paths import literal
from megatron_tf.telemetry.console import Console
from megatron_tf.telemetry.text import count_of

if TYPE_CHECKING:
    from megatron_tf.checkpoint.reader import CheckpointReader

LAST = 5  # checkpoints of a run, where --last does not say


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources", nargs="+", type=path, metavar="DIR", help="a run's folder, or two or more checkpoints"
    )
    parser.add_argument(
        "--last",
        type=whole_number(10_000, least=2),
        metavar="K",
        help=f"of one run, average its newest K checkpoints, or all that it has if fewer (default {LAST})",
    )
    parser.add_argument("--ema", action="store_true", help="the moving average that one checkpoint holds")
    parser.add_argument(
        "--to", dest="target", type=path, required=True, metavar="DIR", help="the folder of the new run"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.checkpoint.architecture import stored_model
    from megatron_tf.checkpoint.averaging import averaged, moving_average
    from megatron_tf.checkpoint.format import folder_name
    from megatron_tf.checkpoint.step_zero import FIRST_STEP, checkpoint_bytes, target_folder, write_step_zero
    from megatron_tf.state.sources import StepZero

    root = target_folder(arguments.target)
    if arguments.ema and len(arguments.sources) > 1:
        raise UserError(
            f"--ema: is of one checkpoint, and {len(arguments.sources)} are given. Give one, or leave it out."
        )
    if arguments.ema and arguments.last is not None:
        raise UserError(f"--ema and --last {arguments.last}: one is of a single checkpoint. Give one of the two.")
    readers = open_sources(arguments.sources, 1 if arguments.ema else arguments.last or LAST)
    source, model = moving_average(readers[0]) if arguments.ema else averaged(readers), stored_model(readers[0].index)
    for reader in readers:
        print(f"from        {reader.path}, step {reader.index.step:,}, {reader.index.tokens:,} tokens")
    if arguments.last is not None and len(readers) < arguments.last:
        print(f"--last      {arguments.last}, and the run has only {count_of(len(readers), 'checkpoint')}")
    result = "the moving average" if arguments.ema else f"the mean of {len(readers)}"
    print(f"to          {root / folder_name(FIRST_STEP)}, {result}")
    if arguments.dry_run:
        return print("\ndry run: nothing is written")
    print("\ncomparing the checksums")
    for reader in readers:
        reader.verify()
    total, began = checkpoint_bytes(model), time.monotonic()
    with Console(rank=0).bytes_written(total) as progress:
        start = StepZero(source, samples=0, tokens=0, growth_history=())
        written = write_step_zero(root, model, start, {}, progress)
    print(f"wrote {written}: {total:,} bytes in {time.monotonic() - began:.1f} s")
    print(f"To evaluate it, give the run's configuration and --checkpoint {literal(str(root.parent))}")


def open_sources(sources: list[Path], last: int) -> list[CheckpointReader]:
    """One checkpoint of each of several `sources`, or the newest `last` checkpoints of a single one.

    CheckpointError when a source holds none, UserError when a checkpoint is named twice.
    """
    from megatron_tf.checkpoint.manager import complete_checkpoints, resolve
    from megatron_tf.checkpoint.reader import open_checkpoint

    if len(sources) > 1:
        found = [resolve(source) for source in sources]
        places = [path.resolve() for path in found]
        if twice := [path for path in places if places.count(path) > 1]:
            raise UserError(f"{twice[0]}: is given twice, and would count double. Name each checkpoint once.")
        return [open_checkpoint(path) for path in found]
    newest = resolve(sources[0])  # reports a missing checkpoint
    if newest == sources[0]:
        return [open_checkpoint(newest)]
    by_step: dict[int, CheckpointReader] = {}
    for reader in complete_checkpoints(newest.parent):  # of two with one step the newer comes first
        by_step.setdefault(reader.index.step, reader)
    return list(by_step.values())[:last]
