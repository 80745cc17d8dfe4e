"""Facts about the data of a run before its first step: passes over them, and warnings of likely mistakes.

Only headers and summaries are read, and no torch is imported: plans are made on laptops.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tf.config.run_plan import evaluated_samples
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.data import Data, DataSource
from megatron_tf.config.tasks import task_of
from megatron_tf.data.indexed import IndexedDataset, data_file
from megatron_tf.data.summary import CorpusSummary, known_end, read_summary, summary_file
from megatron_tf.data.tokenizer import check_kind, load_tokenizer
from megatron_tf.data.tokenizer_files import NotATokenizerError
from megatron_tf.errors import DataError
from megatron_tf.tasks.language_model.section import LanguageModel, vocab_size_of
from megatron_tf.telemetry.text import count_of

# Up to so many passes repeated text is worth nearly as much as new text (Muennighoff et al., "Scaling Data-Constrained
# Language Models", 2023).
MANY_PASSES = 4
SOURCES_NAMED = 4
HALVES = ("_train", "_validation")


@dataclass(frozen=True)
class Passes:
    """How often a run sees a source. `tokens`: the size of the source, in `unit`."""

    path: str
    tokens: int
    passes: float
    unit: str = "tokens"


def passes_over(config: RunConfig, samples: int) -> list[Passes]:
    """Of each source of data.train, when the run takes `samples` samples in all. Raises `DataError` for missing
    data."""
    total, unit = sum(source.weight for source in config.data.train), task_of(config.model).unit
    found = []
    for source in config.data.train:
        dataset = IndexedDataset(source.path)
        # of images each is a document
        count = dataset.num_tokens if unit == "tokens" else dataset.num_documents
        available = (count - 1) // config.model.seq_length if unit == "tokens" else count
        found.append(Passes(source.path, count, samples * source.weight / total / max(1, available), unit))
    return found


def describe_passes(found: Sequence[Passes]) -> str:
    """In words, for one line: "9,000 tokens in data/a: 0.52 passes"."""
    tokens = sum(source.tokens for source in found)
    if len(found) == 1:
        return f"{tokens:,} {found[0].unit} in {found[0].path}, {_times(found[0])} over them"
    most = sorted(found, key=lambda source: -source.passes)
    named = ", ".join(f"{source.path} {_times(source)}" for source in most[:SOURCES_NAMED])
    more = f", {len(most) - SOURCES_NAMED} more less often" if len(most) > SOURCES_NAMED else ""
    return f"{tokens:,} {found[0].unit} in {len(found)} sources: {named}{more}"


def _times(source: Passes) -> str:
    number = f"{source.passes:,.0f}" if source.passes >= 100 else f"{source.passes:.3g}"
    return f"{number} {'pass' if number == '1' else 'passes'}"


def data_warnings(config: RunConfig, found: Sequence[Passes]) -> list[str]:
    """Warnings of likely mistakes with text, a sentence or two each. `found`: from `passes_over`. Raises `DataError`
    when a file of the data cannot be read."""
    if not isinstance(config.model, LanguageModel):
        return []
    return [
        *_pass_warnings(found),
        *_overlap_warnings(config.data),
        *_sample_warnings(config),
        *_end_warnings(config.data),
        *_vocabulary_warnings(config),
    ]


def _pass_warnings(found: Sequence[Passes]) -> Iterator[str]:
    often = sorted((source for source in found if source.passes > MANY_PASSES), key=lambda source: -source.passes)
    if often:
        named = ", ".join(f"{_times(source)} over {source.path} ({source.tokens:,} tokens)" for source in often[:3])
        more = f", and more than {MANY_PASSES} over {count_of(len(often) - 3, 'other')}" if len(often) > 3 else ""
        yield (
            f"data.train: the run makes {named}{more}. Beyond {MANY_PASSES} passes a model learns less and less from "
            "text that it has seen, and in the end learns it by heart. Train for fewer steps, lower the weight, or "
            "prepare more text."
        )


def _overlap_warnings(data: Data) -> Iterator[str]:
    """Warnings of validation data that are training data, or were made from the same text."""
    for validation in dict.fromkeys(source.path for source in data.validation):
        for training in dict.fromkeys(source.path for source in data.train):
            if reason := _same_text(validation, training):
                yield (
                    f"data.validation: {validation} is training data too ({reason}), so the validation loss says "
                    "nothing about text that was not trained on. Hold text out with preprocess_data.py "
                    "--validation-fraction, or prepare other text."
                )
                break


def _same_text(validation: str, training: str) -> str | None:
    """Why two prefixes share text, as far as summaries tell; None when they do not."""
    ours, theirs = IndexedDataset(validation), IndexedDataset(training)
    if os.path.normpath(validation) == os.path.normpath(training):
        return "it is in data.train under the same name"
    if os.path.samefile(data_file(validation), data_file(training)):
        return f"{data_file(training)} is the same file"
    if ours.num_tokens == theirs.num_tokens and ours.ends_digest() == theirs.ends_digest():
        return f"{data_file(training)} has the same content"
    return _same_inputs(validation, training)


def _same_inputs(validation: str, training: str) -> str | None:
    summaries = read_summary(validation), read_summary(training)
    if None in summaries or _are_halves(validation, training):
        return None
    ours, theirs = (set(summary.files) for summary in summaries if summary)
    common = sorted(ours & theirs)
    if not common:
        return None
    return f"{summary_file(training)} names {common[0]} as an input, and so does {summary_file(validation)}"


def _are_halves(validation: str, training: str) -> bool:
    """Whether one preparation has split its inputs into the two."""
    stems = [Path(path).name.removesuffix(half) for path, half in zip((training, validation), HALVES)]
    is_split = Path(training).name.endswith(HALVES[0]) and Path(validation).name.endswith(HALVES[1])
    return is_split and stems[0] == stems[1] and Path(training).parent.resolve() == Path(validation).parent.resolve()


def _sample_warnings(config: RunConfig) -> Iterator[str]:
    sources = [IndexedDataset(source.path) for source in config.data.validation]
    available = [max(0, (source.num_tokens - 1) // config.model.seq_length) for source in sources]
    if sources and (warning := evaluation_warning(config.evaluation.samples, max(1, sum(available)))):
        yield warning
    elif len(sources) > 1:
        yield from _repeated(config, available)


def _repeated(config: RunConfig, available: Sequence[int]) -> Iterator[str]:
    """A warning when an evaluation, which is dealt by weight and in whole batches, begins a source again. `available`:
    samples of each."""
    sources, batch, taken = config.data.validation, config.training.global_batch_size, evaluated_samples(config)
    weight = sum(source.weight for source in sources)
    lengths = [int(count * weight / source.weight) for source, count in zip(sources, available)]
    first = min(range(len(sources)), key=lengths.__getitem__)
    if taken > lengths[first]:
        whole = lengths[first] // batch * batch
        least = max(1, lengths[first])
        remedy = f"it to at most {whole}" if whole else f"training.global_batch_size to at most {least}"
        yield (
            f"evaluation.samples: {config.evaluation.samples:,}, which are {taken:,} in whole batches of {batch:,}, "
            f"but by the weights of data.validation all of {sources[first].path}, "
            f"{count_of(available[first], 'sample')}, is read once after {lengths[first]:,}: more of it counts again. "
            f"Set {remedy}, or the weights by the sizes."
        )


def _end_warnings(data: Data) -> Iterator[str]:
    """A warning of different ends of documents, for data that do not need them: no error, but the model learns both."""
    ends = {summary.eod_id: path for path, summary in _summaries((*data.train, *data.validation))}
    if len(ends) > 1:
        named = ", ".join(f"{end} in {path}" for end, path in ends.items())
        yield (
            f"data: documents end with different tokens: {named}. Prepare all of them with the same --eod-token of "
            "preprocess_data.py."
        )


def tokenizer_problem(config: RunConfig) -> str | None:
    """The problem when data.tokenizer is not a tokenizer, or has more tokens than the model, as far as its name,
    summaries or the file tell; None without a problem."""
    name = config.data.tokenizer
    if name is None or not isinstance(config.model, LanguageModel):
        return None
    size = config.model.vocab_size
    try:
        check_kind(name)
        found = _sizes(config.data) or load_tokenizer(name, known_end(config.data)).vocab_size
    except NotATokenizerError as error:
        return f"data.tokenizer: {error}"
    except DataError:
        # Training needs neither the tokenizer nor its package, and says itself what it cannot read.
        return None
    if found <= size:
        return None
    return (
        f"model.vocab_size: {size:,}, but data.tokenizer {name} has {found:,} tokens, and some of them would have no "
        f"row in the model. Set model.vocab_size to at least {found}."
    )


def _vocabulary_warnings(config: RunConfig) -> Iterator[str]:
    found, size = _sizes(config.data), vocab_size_of(config.model)
    if config.data.tokenizer is None and found is not None and found > size:
        yield (
            f"model.vocab_size: {size:,}, but the data were made with a tokenizer of {found:,} tokens, which "
            f"evaluation, generation and export will refuse for this model. Set model.vocab_size to at least {found}."
        )


def _sizes(data: Data) -> int | None:
    """The vocabulary size of the tokenizer that the data were made with; None without a summary."""
    return max((summary.vocab_size for _, summary in _summaries((*data.train, *data.validation))), default=None)


def _summaries(sources: Sequence[DataSource]) -> Iterator[tuple[str, CorpusSummary]]:
    for path in dict.fromkeys(source.path for source in sources):
        summary = read_summary(path)
        if summary is not None:
            yield path, summary


def evaluation_warning(samples: int, available: int) -> str | None:
    """A warning when an evaluation of `samples` samples repeats some of the `available` ones; None otherwise."""
    if samples <= available:
        return None
    return (
        f"evaluation.samples: {samples:,}, but the validation data has "
        f"{count_of(available, 'sample')}: each evaluation goes round it {samples / available:,.1f} times and takes as "
        f"much longer. Set it to at most {available}."
    )
