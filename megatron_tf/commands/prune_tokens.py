"""Drop the parameter tokens that contribute least:
`python tools/prune_tokens.py --from runs/tiny_grow --tokens qkv=128,ffn=512 --data data/demo/validation --to runs/small`.

What a token contributes is the mean of |S|·‖v‖ over the positions of a sample of prepared data; every projection of
every layer makes its own selection, and gets the scale τ with which its output stays closest. The loss before and after
is measured on another part of the data. The result is step 0 of a smaller run: it can be trained further and grown
again. Needs no GPU, and memory for the model's weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tf.arguments import path
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.schema import Model
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.paths import literal
from megatron_tf.state.parameters import projections
from megatron_tf.telemetry.console import Console

if TYPE_CHECKING:
    from megatron_tf.checkpoint.reader import CheckpointReader
    from megatron_tf.state.sources import StepZero
    from megatron_tf.tasks.data import Batch


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from", dest="source", type=path, required=True, metavar="DIR", help="run folder or checkpoint to prune"
    )
    parser.add_argument("--tokens", required=True, metavar="KIND=N,...", help="counts to prune to, of qkv, proj, ffn")
    parser.add_argument("--data", type=path, required=True, metavar="PREFIX", help="prepared data to measure on")
    parser.add_argument("--samples", type=int, metavar="N", help="samples to measure, and as many others for the loss "
                        "(default 64, or half of the data)")  # fmt: skip
    parser.add_argument("--to", dest="target", type=path, required=True, metavar="DIR", help="the smaller run's folder")
    parser.add_argument("--dry-run", action="store_true", help="measure and report, and write nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.checkpoint.architecture import check_prunable, stored_model, token_counts
    from megatron_tf.checkpoint.format import folder_name
    from megatron_tf.checkpoint.manager import resolve
    from megatron_tf.checkpoint.reader import open_checkpoint
    from megatron_tf.checkpoint.step_zero import FIRST_STEP, target_folder
    from megatron_tf.inference.load import load_model
    from megatron_tf.pruning.measure import (
        DataSample,
        check_run_tokenizer,
        drop_tokens,
        fit_scales,
        mean_loss,
        pruned_start,
        select_tokens,
        target_counts,
    )
    from megatron_tf.tasks.language_model.section import check_reads_text

    prefix = str(arguments.data)
    root = target_folder(arguments.target)
    reader = open_checkpoint(resolve(arguments.source))
    old = stored_model(reader.index)
    old_counts = token_counts(old, "pruned")
    check_prunable(old)
    check_reads_text(old, "a measurement on prepared text")
    counts = target_counts(arguments.tokens, old_counts)
    new = architecture_of(old).with_token_counts(old, counts)
    kinds = {name: projection.kind for name, projection in projections(old).items()}
    data = DataSample(prefix, old, arguments.samples)
    compared = check_run_tokenizer(reader.path, prefix)
    print(f"from        {reader.path}, step {reader.index.step:,}, {reader.index.tokens:,} tokens")
    print(f"to          {root / folder_name(FIRST_STEP)}")
    if not compared:
        print("tokenizer   not compared: there is no config.yml of a run around the checkpoint")

    model = load_model(reader.path)
    with Console(rank=0).progress(4 * data.num_batches, 0, "batches") as bar:
        done = count(1)

        def watched(batches: Iterable[Batch], purpose: str) -> Iterator[Batch]:
            for batch in batches:
                bar.advance(next(done), purpose)
                yield batch

        before = mean_loss(model, watched(data.held, "loss before"))
        selection = select_tokens(model, watched(data.measured, "contributions"), counts)
        scales = fit_scales(model, watched(data.measured, "scales"), selection.kept)
        drop_tokens(model, selection.kept, scales)
        after = mean_loss(model, watched(data.held, "loss after"))
    del model
    ratios = {name: scale / reader.index.scales[name] for name, scale in scales.items()}
    for kind, tokens in old_counts.items():
        of_kind = [name for name in ratios if kinds[name] == kind]
        shares = [selection.dropped_share[name] for name in of_kind]
        describe(kind, tokens, counts[kind], shares, [ratios[name] for name in of_kind])
    print(f"parameters  {num_parameters(old):,} -> {num_parameters(new):,}")
    print(f"loss        {before:.6f} -> {after:.6f}, on {data.samples} samples of {old.seq_length} tokens")
    measured = {"loss_before": before, "loss_after": after, "data": prefix, "data_samples": data.samples}
    if arguments.dry_run:
        return print("\ndry run: nothing is written")
    write(root, new, pruned_start(reader, new, selection.kept, scales, measured), reader)


def describe(kind: str, old: int, new: int, shares: Sequence[float], factors: Sequence[float]) -> None:
    """`shares`, `factors`: of each projection that loses tokens, what they contribute and τ'/τ."""
    change = "tokens, as they are"
    if shares:
        lost = f"{min(shares):.2%} to {max(shares):.2%} of what they contribute"
        change = f"tokens -> {new:,}, which drops {lost}; τ times {min(factors):.4f} to {max(factors):.4f}"
    print(f"{kind:<11} {old:,} {change}")


def write(root: Path, model: Model, start: StepZero, reader: CheckpointReader) -> None:
    from megatron_tf.checkpoint.step_zero import checkpoint_bytes, write_step_zero

    total = checkpoint_bytes(model, start.states)
    with Console(rank=0).bytes_written(total) as progress:
        path = write_step_zero(root, model, start, reader.index.data, progress)
    changes = " ".join(
        f"model.parameter_tokens.{kind}={n}" for kind, n in architecture_of(model).token_counts(model).items()
    )
    print(
        f"\nwrote {path}: {total:,} bytes. A run resumes from it with\n  run.dir={literal(str(root.parent))} {changes}"
    )
