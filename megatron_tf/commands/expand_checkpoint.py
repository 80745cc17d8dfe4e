"""Grow a checkpoint into a bigger model's, ready to be trained on:
`python tools/expand_checkpoint.py --from runs/124M --config configs/354M.yml --to runs/354M`.

Writes step 0 of the bigger run, to the last bit what training would begin with when it grows the model itself: a run
of this configuration in this folder resumes from it. Needs no GPU, and memory for a few buffers whatever the size.
Token counts, candidates of model.sparse and the number of layers may differ, and of a Transformer also the width.
`growth` in the configuration says how to grow; without it, tokens by zero_key, layers by identity and width by cloning.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tf.arguments import config_file, path
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.load import load_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.paths import literal
from megatron_tf.state.parameters import projections
from megatron_tf.telemetry.console import MEGABYTE, Console

if TYPE_CHECKING:
    from megatron_tf.checkpoint.reader import CheckpointReader
    from megatron_tf.state.sources import StepZero


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from", dest="source", type=path, required=True, metavar="DIR", help="run folder or checkpoint to grow"
    )
    parser.add_argument(
        "--config", type=config_file, required=True, metavar="FILE", help="the bigger run's configuration"
    )
    parser.add_argument("--to", dest="target", type=path, required=True, metavar="DIR", help="the bigger run's folder")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replace values of the file")
    return parser.parse_intermixed_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.checkpoint.format import folder_name
    from megatron_tf.checkpoint.moments import resolve_at
    from megatron_tf.checkpoint.reader import open_checkpoint
    from megatron_tf.checkpoint.step_zero import target_folder
    from megatron_tf.growth.grow import grow

    config = load_config(arguments.config, arguments.overrides)
    growth = config.growth or Growth.model_validate({"from": literal(str(arguments.source))})
    reader = open_checkpoint(resolve_at(arguments.source, growth.at))
    root = target_folder(arguments.target)
    data = training_data(config)
    start = grow(reader, config.model, growth, seed=config.run.seed, data=data, optimizer=config.optimizer.type)

    describe(config, growth, reader, start, root / folder_name(0))
    if data is None:
        print("data        not here: taken to be what the source was trained on; a run on other data will refuse")
    if os.path.normpath(config.run.dir) not in map(os.path.normpath, (root, root.parent)):
        print(
            f"run.dir     is {config.run.dir}: start the run with run.dir={literal(str(root.parent))} to resume from "
            "what is written"
        )
    if arguments.dry_run:
        print("\ndry run: nothing is written")
        return
    print("\ncomparing the source's checksums")
    reader.verify()
    write(config, start, reader.index.data if data is None else data, root)


def training_data(config: RunConfig) -> dict[str, Any] | None:
    """Fingerprint of the run's training data; None when a file of it is not on this machine."""
    from megatron_tf.data.indexed import data_file, index_file
    from megatron_tf.data.loader import fingerprint

    files = [file(source.path) for source in config.data.train for file in (data_file, index_file)]
    return fingerprint(config.data.train, config.run.seed) if all(map(os.path.exists, files)) else None


def describe(config: RunConfig, growth: Growth, reader: CheckpointReader, start: StepZero, target: Path) -> None:
    from megatron_tf.checkpoint.architecture import stored_model
    from megatron_tf.checkpoint.step_zero import checkpoint_bytes
    from megatron_tf.growth.methods import BANK, SPLIT

    index, old = reader.index, stored_model(reader.index)
    print(f"from        {reader.path}, step {index.step:,}, {index.tokens:,} tokens")
    print(f"to          {target}, seed {config.run.seed}, position {start.samples:,} in the data")
    after = architecture_of(config.model).token_counts(config.model)
    banks = {projection.kind: projection.bank for projection in projections(old).values()}
    used = {projection.kind: projection for projection in projections(config.model).values()}
    for kind, count in architecture_of(old).token_counts(old).items():
        grows = after[kind] > count
        row = f"{count:,} tokens" + (f" -> {after[kind]:,} by {growth.method_of(kind)}" if grows else ", as they are")
        if grows and growth.method == BANK and used[kind].bank and not banks[kind]:
            row += f", {used[kind].bank}"
        if growth.method == SPLIT and used[kind].bank:
            bank = banks[kind]
            row = f"{count:,} tokens, copied to {used[kind].bank}"
            if bank is not None:
                row = f"{count:,} tokens, {bank.candidates} candidates copied to {used[kind].bank}"
            if bank == used[kind].bank:
                row = f"{count:,} tokens, {bank}, as they are"
        print(f"{kind:<11} {row}, τ {scale_of(old, index.scales, kind)} -> {scale_of(old, start.source.scales, kind)}")
    if (width := start.growth_history[-1].get("width")) is not None:
        print("\n".join(about_width(width)))
    if old.num_layers != config.model.num_layers:
        print(
            f"{'layers':<11} {old.num_layers} -> {config.model.num_layers} by {growth.depth_method}; moments of new "
            "ones: 0"
        )
    print(f"parameters  {num_parameters(old):,} -> {num_parameters(config.model):,}")
    held = sum(file.num_bytes for file in reader.manifest.files.values())
    print(f"bytes       {held:,} -> {checkpoint_bytes(config.model, start.states):,}")
    times = f", times {growth.moments_factor:g}" if growth.moments_factor != 1 else ""
    print(f"moments     of old tokens: {growth.moments}{times}; of new tokens: 0")
    noise = f", noise {growth.noise:g} on old tokens" if growth.noise else ""
    print(f"function    {'kept, to rounding' if start.growth_history[-1]['preserves'] else f'CHANGED{noise}'}")


def about_width(width: Mapping[str, Any]) -> Iterator[str]:
    """Lines about a growth in width. `width`: its entry in the checkpoint's history of growth."""
    from megatron_tf.growth.width import alike

    for key, size in width["from"].items():
        yield f"{key} {size} -> {width['to'][key]} by cloning; moments of all: 0"
    if (warning := alike(width)) is not None:
        yield f"warning     {warning}"


def scale_of(model: Model, scales: Mapping[str, float], kind: str) -> str:
    """The distinct τ of all projections of `kind`, as a text."""
    names = [name for name, projection in projections(model).items() if projection.kind == kind]
    return ", ".join(dict.fromkeys(f"{scales[name]:.6g}" for name in names))


def write(config: RunConfig, start: StepZero, data: Mapping[str, Any], root: Path) -> None:
    from megatron_tf.checkpoint.step_zero import checkpoint_bytes, write_step_zero

    total, began = checkpoint_bytes(config.model, start.states), time.monotonic()
    with Console(rank=0).bytes_written(total) as progress:
        path = write_step_zero(root, config.model, start, data, progress)
    seconds = time.monotonic() - began
    print(f"wrote {path}: {total:,} bytes in {seconds:.1f} s, {total / seconds / MEGABYTE:,.0f} MB/s")
