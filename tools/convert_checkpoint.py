"""Bring in official TokenFormer weights, or write a checkpoint's weights as an official file:
`python tools/convert_checkpoint.py from-official pytorch_model.bin --to runs/150M`
`python tools/convert_checkpoint.py to-official runs/150M --to pytorch_model.bin`.

from-official reads the published file, or a training checkpoint of the official repository (its fp32 master weights),
without running anything in it, and writes step 0 of a run, to be trained on, grown and evaluated: the weights, τ = √n
and Adam moments of 0. The model is known by its shapes if it is one of those published, and otherwise given by --config.
to-official is the inverse, to the last bit, for every model whose τ is √n. Needs no GPU.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_tf.checkpoint.format import folder_name
from megatron_tf.checkpoint.manager import resolve
from megatron_tf.checkpoint.reader import open_checkpoint
from megatron_tf.checkpoint.step_zero import FIRST_STEP, state_bytes
from megatron_tf.config.load import load_config
from megatron_tf.config.schema import Model
from megatron_tf.convert.official_checkpoint import (
    check_export_target,
    compare_logits,
    exportable_model,
    import_folder,
    matching_model,
    official_settings,
    write_imported,
    write_official,
)
from megatron_tf.convert.official_files import open_official
from megatron_tf.convert.torch_file import check_bytes
from megatron_tf.errors import run_command
from megatron_tf.estimate import num_parameters
from megatron_tf.params import default_scale
from megatron_tf.telemetry.console import Console

OFFICIAL_VOCABULARY_MULTIPLE = 128  # make_vocab_size_divisible_by, unless a configuration says otherwise


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    importer = commands.add_parser("from-official", help="official weights into step 0 of a run")
    importer.add_argument("source", type=Path, help="pytorch_model.bin, or a folder of official training checkpoints")
    importer.add_argument("--to", dest="target", required=True, metavar="DIR", help="the run's folder")
    importer.add_argument("--config", metavar="FILE", help="configuration whose model the weights must be of")
    importer.add_argument("--reference", type=Path, metavar="FILE", help="safetensors of the official code's input_ids "
                          "and logits, to compare with before anything is written")  # fmt: skip
    importer.set_defaults(command=from_official)
    exporter = commands.add_parser("to-official", help="a checkpoint's weights into an official file")
    exporter.add_argument("source", help="run folder or checkpoint; memory for its weights is needed")
    exporter.add_argument("--to", dest="target", required=True, type=Path, metavar="FILE", help="the file to write")
    exporter.set_defaults(command=to_official)
    for command in (importer, exporter):
        command.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    arguments.command(arguments)


def from_official(arguments: argparse.Namespace) -> None:
    root = import_folder(arguments.target)
    given = load_config(arguments.config).model if arguments.config else None
    weights = open_official(arguments.source)
    model, origin = matching_model(weights, given)
    print(f"from        {arguments.source}: {weights.description}, "
          f"{sum(file.stat().st_size for file in weights.files):,} bytes")  # fmt: skip
    print(f"to          {root / folder_name(FIRST_STEP)}")
    describe(model, origin)
    print("moments     0: training goes on from the weights alone, with a schedule of its own")
    if arguments.reference:
        agreement = compare_logits(weights, model, arguments.reference)
        print(f"reference   logits differ by {agreement.error:.2g} at most; the largest is {agreement.largest:.3g}")
    if arguments.dry_run:
        return print("\ndry run: nothing is written")
    print("\ncomparing the checksums in the source")
    for file in weights.files:
        check_bytes(file)
    total, began = state_bytes(model), time.monotonic()
    with Console(rank=0).bytes_written(total) as progress:
        path = write_imported(root, model, weights, progress)
    print(f"wrote {path}: {total:,} bytes in {time.monotonic() - began:.1f} s")
    config = arguments.config or "a configuration of this model"
    print(f"To train on, run {config} with run.dir={root.parent}; to grow, one with growth.from={root.parent}")


def to_official(arguments: argparse.Namespace) -> None:
    check_export_target(arguments.target)
    reader = open_checkpoint(resolve(arguments.source))
    model = exportable_model(reader)
    print(f"from        {reader.path}, step {reader.index.step:,}, {reader.index.tokens:,} tokens")
    print(f"to          {arguments.target}")
    describe(model, "as the checkpoint says")
    print("for use with the official code, whose configuration must say")
    for key, value in official_settings(model).items():
        print(f'  "{key}": {value:g}' if isinstance(value, float) else f'  "{key}": {value!r}'.replace("'", '"'))
    if model.vocab_size % OFFICIAL_VOCABULARY_MULTIPLE:
        print(f"  and a make_vocab_size_divisible_by with which the tokenizer gives {model.vocab_size:,} rows")
    if arguments.dry_run:
        return print("\ndry run: nothing is written")
    print("\ncomparing the source's checksums")
    reader.verify()
    size = write_official(arguments.target, model, reader)
    print(f"wrote {arguments.target}: {size:,} bytes")


def describe(model: Model, origin: str) -> None:
    print(f"model       {origin}")
    print(f"            {model.num_layers} layers × {model.hidden_size}, {model.num_attention_heads} heads, "
          f"{model.seq_length:,} positions, {model.vocab_size:,} vocabulary rows, {model.activation}")  # fmt: skip
    for kind, count in model.token_counts.model_dump().items():
        print(f"{kind:<11} {count:,} tokens, τ {default_scale(count, model.activation):.6g}")
    print(f"parameters  {num_parameters(model):,}")


if __name__ == "__main__":
    run_command(main)
