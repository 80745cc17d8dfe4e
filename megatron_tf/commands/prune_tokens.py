"""Drop the parameter tokens that contribute least, or take candidates of model.sparse away:
`python tools/prune_tokens.py --from runs/tiny_grow --tokens qkv=128,ffn=512 --data data/demo/validation --to
runs/small`.

What a token contributes is the mean of |S|·‖v‖ over the positions of a sample of prepared data; every projection of
every layer makes its own selection, and gets the scale τ with which its output stays closest. The loss before and after
is measured on another part of the data.

--candidates ffn=4 leaves 4 candidates in each slot of a model with model.sparse, and ffn=1 makes it dense. Those that
contribute least are dropped, or neighbours are merged into their mean: both are measured, and the better one is taken.

The result is step 0 of a smaller run: it can be trained further and grown
again. Needs no GPU, and memory for the model's weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tf.arguments import path
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.nearest import either
from megatron_tf.config.sections.model import Model
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.errors import UserError
from megatron_tf.paths import literal
from megatron_tf.state.parameters import projections
from megatron_tf.telemetry.console import Console
from megatron_tf.telemetry.text import count_of

if TYPE_CHECKING:
    from megatron_tf.checkpoint.reader import CheckpointReader
    from megatron_tf.pruning.measure import Batch, DataSample
    from megatron_tf.state.sources import StepZero

    Watch = Callable[[Iterable[Batch], str], Iterator[Batch]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--from", dest="source", type=path, required=True, metavar="DIR", help="run folder or checkpoint to prune"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tokens", metavar="KIND=N,...", help="counts to prune to, of qkv, proj, ffn")
    what.add_argument(
        "--candidates", metavar="KIND=N,...", help="candidates to leave in each slot; 1 makes a projection dense"
    )
    parser.add_argument("--data", type=path, required=True, metavar="PREFIX", help="prepared data to measure on")
    parser.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="samples to measure, and as many others for the loss (default 64, or half of the data)",
    )
    parser.add_argument("--to", dest="target", type=path, required=True, metavar="DIR", help="the smaller run's folder")
    parser.add_argument("--dry-run", action="store_true", help="measure and report, and write nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.checkpoint.architecture import stored_model, token_counts
    from megatron_tf.checkpoint.format import folder_name
    from megatron_tf.checkpoint.manager import resolve
    from megatron_tf.checkpoint.reader import open_checkpoint
    from megatron_tf.checkpoint.step_zero import FIRST_STEP, target_folder
    from megatron_tf.pruning.measure import DataSample, boundaries_of_run, check_run_tokenizer
    from megatron_tf.tasks.language_model.section import check_reads_text

    prefix = str(arguments.data)
    root = target_folder(arguments.target)
    reader = open_checkpoint(resolve(arguments.source))
    old = stored_model(reader.index)
    token_counts(old, "pruned")
    check_reads_text(old, "a measurement on prepared text")
    new = (
        fewer_candidates(old, arguments.candidates) if arguments.tokens is None else fewer_tokens(old, arguments.tokens)
    )
    data = DataSample(prefix, old, arguments.samples, boundaries_of_run(reader.path, prefix))
    compared = check_run_tokenizer(reader.path, prefix)
    print(f"from        {reader.path}, step {reader.index.step:,}, {reader.index.tokens:,} tokens")
    print(f"to          {root / folder_name(FIRST_STEP)}")
    if not compared:
        print("tokenizer   not compared: there is no config.yml of a run around the checkpoint")

    if data.ends:
        print(f"documents   attention begins anew after token {either(data.ends)}, as in training")
    prune = take_candidates_of if arguments.tokens is None else drop_tokens_of
    start = prune(reader, old, new, data)
    entry = start.growth_history[-1]
    before, after = entry["loss_before"], entry["loss_after"]
    print(f"parameters  {num_parameters(old):,} -> {num_parameters(new):,}")
    print(f"loss        {before:.6f} -> {after:.6f}, on {count_of(data.samples, 'sample')} of {old.seq_length} tokens")
    if arguments.dry_run:
        return print("\ndry run: nothing is written")
    write(root, new, start, reader)


def fewer_tokens(old: Model, text: str) -> Model:
    """The model that `--tokens` asks for."""
    from megatron_tf.checkpoint.architecture import check_prunable
    from megatron_tf.pruning.measure import target_counts

    counts = target_counts(text, architecture_of(old).token_counts(old))
    check_prunable(old, counts)
    return architecture_of(old).with_token_counts(old, counts)


def fewer_candidates(old: Model, text: str) -> Model:
    """The model that `--candidates` asks for. UserError when `old` has no candidates."""
    from megatron_tf.pruning.candidates import with_candidates
    from megatron_tf.pruning.measure import target_counts
    from megatron_tf.state.parameters import candidate_counts

    counts = candidate_counts(old)
    if not counts:
        raise UserError(f"--candidates: {text}, and the model has 0: model.sparse is null. Give --tokens instead.")
    return with_candidates(old, target_counts(text, counts, "--candidates"))


@contextmanager
def watching(passes: int, data: DataSample) -> Iterator[Watch]:
    """Shows the progress of `passes` over the data. Yields a function that wraps the batches of one pass."""
    with Console(rank=0).progress(passes * data.num_batches, 0, "batches") as bar:
        done = count(1)

        def watched(batches: Iterable[Batch], purpose: str) -> Iterator[Batch]:
            for batch in batches:
                bar.advance(next(done), purpose)
                yield batch

        yield watched


def drop_tokens_of(reader: CheckpointReader, old: Model, new: Model, data: DataSample) -> StepZero:
    """Measures which tokens to drop, prints the result, and returns the smaller model's step 0."""
    from megatron_tf.inference.load import load_model
    from megatron_tf.pruning.measure import drop_tokens, fit_scales, mean_loss, pruned_start, select_tokens

    old_counts, counts = (architecture_of(of).token_counts(of) for of in (old, new))
    kinds = {name: projection.kind for name, projection in projections(old).items()}
    model = load_model(reader.path)
    with watching(4, data) as watched:
        before = mean_loss(model, watched(data.held, "loss before"), data.ends)
        selection = select_tokens(model, watched(data.measured, "contributions"), counts, data.ends)
        scales = fit_scales(model, watched(data.measured, "scales"), selection.kept, data.ends)
        drop_tokens(model, selection.kept, scales)
        after = mean_loss(model, watched(data.held, "loss after"), data.ends)
    ratios = {name: scale / reader.index.scales[name] for name, scale in scales.items()}
    for kind, tokens in old_counts.items():
        of_kind = [name for name in ratios if kinds[name] == kind]
        shares = [selection.dropped_share[name] for name in of_kind]
        describe(kind, tokens, counts[kind], shares, [ratios[name] for name in of_kind])
    return pruned_start(reader, new, selection.kept, scales, measured(before, after, data))


def take_candidates_of(reader: CheckpointReader, old: Model, new: Model, data: DataSample) -> StepZero:
    """Measures which candidates to take away and how, prints the result, and returns the smaller model's step 0."""
    from megatron_tf.checkpoint.source import CheckpointSource
    from megatron_tf.inference.load import load_model
    from megatron_tf.pruning.candidates import DROP, measure_use, mixtures
    from megatron_tf.pruning.condensed import CondensedSource, condensed_model
    from megatron_tf.pruning.measure import mean_loss, smaller_start

    model = load_model(reader.path)
    with watching(5, data) as watched:
        before = mean_loss(model, watched(data.held, "loss before"), data.ends)
        use = measure_use(model, watched(data.measured, "contributions"), data.ends)
        del model
        ways = mixtures(use, new)
        sources, losses = {}, {}
        for way, mixture in ways.items():
            sources[way] = CondensedSource(CheckpointSource(reader), old_model=old, model=new, mixtures=mixture)
            smaller, batches = condensed_model(sources[way], new), watched(data.measured, f"loss of {way}")
            losses[way] = mean_loss(smaller, batches, data.ends)
        best = min(losses, key=lambda way: losses[way])
        after = mean_loss(condensed_model(sources[best], new), watched(data.held, "loss after"), data.ends)
    shares = [use[name].dropped_share(mixture) for name, mixture in ways[DROP].items()]
    describe_candidates(old, new, shares)
    told = ", ".join(f"{way} {loss:.6f}" for way, loss in losses.items())
    print(f"ways        {told}, on the samples that were measured; taken: {best}")
    sections = {key: architecture_of(of).sparse_sections(of) for key, of in (("from", old), ("to", new))}
    return smaller_start(
        reader, new, sources[best], {**measured(before, after, data), "sparse": sections, "candidates_by": best}
    )


def measured(before: float, after: float, data: DataSample) -> dict[str, Any]:
    """The entries of the checkpoint's history about the measurement. `before`, `after`: loss in nats a token."""
    return {"loss_before": before, "loss_after": after, "data": data.prefix, "data_samples": data.samples}


def describe_candidates(old: Model, new: Model, shares: Sequence[float]) -> None:
    """Prints the change of each kind of projection. `shares`: for each projection with candidates, the share of their
    contribution that "drop" leaves out."""
    after = {spec.kind: spec for spec in projections(new).values()}
    for kind, bank in {spec.kind: spec.bank for spec in projections(old).values() if spec.bank}.items():
        left = after[kind].bank or f"{after[kind].tokens:,} tokens, which every position uses"
        print(f"{kind:<11} {bank} -> {left}")
    print(f"drop        leaves out {min(shares):.2%} to {max(shares):.2%} of what the candidates contribute")


def describe(kind: str, old: int, new: int, shares: Sequence[float], factors: Sequence[float]) -> None:
    """Prints the change of one kind of projection from `old` to `new` tokens.

    `shares`, `factors`: for each projection that loses tokens, the share of the contribution that is lost, and τ'/τ.
    """
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
    # of this and of earlier prunings: the user has the configuration of a run before them
    counts, section = architecture_of(model).token_counts(model), dict(model).get("sparse")
    changes = [f"model.parameter_tokens.{kind}={n}" for kind, n in counts.items()]
    if section is not None or any("sparse" in entry for entry in start.growth_history):
        sparse = json.dumps(section and section.model_dump()).replace('"', "")
        changes.append(f"'model.sparse={sparse}'")
    print(
        f"\nwrote {path}: {total:,} bytes. A run resumes from it with\n  run.dir={literal(str(root.parent))} "
        f"{' '.join(changes)}"
    )
