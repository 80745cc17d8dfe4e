"""Text files to token files: the parts of a preparation are written, by one run or by many, and then merged.

The output depends on the inputs, the tokenizer and the settings that decide what a document is; not on the number of
processes, on who wrote which part, or on how often the work was interrupted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_tf.data.indexed import IndexedDataset, data_file, index_file, publish_pair
from megatron_tf.data.losses import SAMPLE, comes_back
from megatron_tf.data.preparation.encoding import EncodeSettings
from megatron_tf.data.preparation.inputs import expand_inputs
from megatron_tf.data.preparation.lanes import write_parts
from megatron_tf.data.preparation.merge import merge_pairs
from megatron_tf.data.preparation.parquet import check_columns
from megatron_tf.data.preparation.part_writer import OnError, PartJob
from megatron_tf.data.preparation.parts import Part, file_lock, key_of, plan_parts
from megatron_tf.data.preparation.progress import ProgressDisplay
from megatron_tf.data.preparation.record_types import ReadLimits
from megatron_tf.data.preparation.records import is_one_document
from megatron_tf.data.preparation.report import Report, SplitCounts, read_report, write_report
from megatron_tf.data.summary import CorpusSummary, check_replaceable, read_summary, write_summary
from megatron_tf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tf.data.tokenizer_identity import tokenizer_identity
from megatron_tf.durable import partial_path, prepare_output
from megatron_tf.errors import DataError, file_errors

REMEDY = "Free space, correct the permissions or choose another prefix, then run again: finished parts are kept."
SplitBy = Literal["documents", "blocks"]
_OUTPUT = re.compile(r"\.parts(/.*)?|((_train|_validation)?\.(bin|idx|json)|\.report\.json)(\.partial)?", re.DOTALL)


@dataclass(frozen=True)
class PreprocessSettings:
    inputs: tuple[str, ...]  # files and globs
    tokenizer: str  # as `load_tokenizer` takes it
    output_prefix: str
    json_key: str = "text"  # field of a .jsonl line, column of a .parquet, that holds the document
    workers: int = 1  # processes that encode; 1 encodes in this one
    on_error: OnError = "stop"  # what a bad record does
    validation_fraction: float = 0.0  # share of documents, by hash of their text, that goes to PREFIX_validation
    split_by: SplitBy | None = None  # hold out documents, or blocks of each; None: blocks where there is one document
    max_document_bytes: int = ReadLimits().max_document_bytes  # of a record as it stands in its file
    eod_token: str | None = None  # the one that ends a document; None: the tokenizer's of a usual name
    keep_lossy: bool = False  # documents of which the tokenizer loses characters, instead of calling them bad
    shard_index: int = 0  # of num_shards runs that share the parts, each on its own
    num_shards: int = 1
    replace: bool = False  # what is there already under the prefix, when it is not what these settings give


@dataclass(frozen=True)
class Plan:
    """A preparation, checked, before anything is read."""

    settings: PreprocessSettings
    tokenizer: Tokenizer
    files: tuple[Path, ...]
    parts: tuple[Part, ...]  # of all shards, in the order in which they are merged
    endings: tuple[str, ...]  # of the prefixes that are written
    key: str  # names the work: the same for all that may share it

    @property
    def prefixes(self) -> dict[str, str]:
        """Ending -> prefix."""
        return {ending: self.settings.output_prefix + ending for ending in self.endings}

    @property
    def report_path(self) -> Path:
        return Path(f"{self.settings.output_prefix}.report.json")

    @property
    def folder(self) -> Path:
        """Where the parts stand."""
        return self.parts[0].folder


def preprocess(settings: PreprocessSettings, progress: ProgressDisplay) -> dict[str, CorpusSummary]:
    """Write the parts of this shard that are not finished, and merge when those of all shards are.

    Writes PREFIX.bin, .idx, .json, or with a validation fraction those of PREFIX_train and PREFIX_validation, and
    PREFIX.report.json. Returns the summary of each prefix; of none when other shards have yet to finish. What is there
    already is left as it is. Raises `DataError` for every mistake in the inputs, and for other data under the prefix
    unless they may be replaced; older output is then unchanged.
    """
    plan = make_plan(settings, progress.note)
    summaries = _finished(plan)
    if summaries is not None:
        progress.note(f"{settings.output_prefix}: was prepared from the same files with the same settings before")
        _note_remarks(plan, progress)
        return summaries
    _check_replaceable(plan)
    if (returned := comes_back(plan.tokenizer)) is not None:
        progress.note(f"{settings.tokenizer}: changes text: {SAMPLE!r} comes back from its tokens as {returned!r}")
    own = plan.parts[settings.shard_index :: settings.num_shards]
    todo = [part for part in own if part.report() is None]
    if len(todo) < len(own):
        progress.note(f"{len(own) - len(todo)} of {len(own)} parts were finished before")
    for prefix in plan.prefixes.values():
        prepare_output(index_file(prefix))
    progress.start(sum(part.bytes for part in todo))
    try:
        busy = write_parts(_job(plan), todo, settings.workers, progress)
    finally:
        progress.stop()
        _remove_if_empty(plan.folder)
    if busy:
        progress.note(f"{len(busy)} parts are in the hands of other processes")
    return _merge_if_possible(plan, progress, insist=settings.num_shards == 1 and not busy)


def merge_shards(settings: PreprocessSettings, progress: ProgressDisplay) -> dict[str, CorpusSummary]:
    """Only merge: the summaries as `preprocess` returns them. Raises `DataError` when parts are missing."""
    plan = make_plan(settings)
    _check_replaceable(plan)
    return _merge_if_possible(plan, progress, insist=True)


def make_plan(settings: PreprocessSettings, note: Callable[[str], None] = lambda text: None) -> Plan:
    """Check the settings and look at the inputs. Raises `DataError`. `note` is told what is noteworthy of these."""
    if not 0 <= settings.validation_fraction < 1:
        raise DataError(f"validation fraction is {settings.validation_fraction}. Choose it in [0, 1).")
    if settings.workers < 1:
        raise DataError(f"the number of workers is {settings.workers}. Choose at least 1.")
    if settings.max_document_bytes < 1:
        raise DataError(f"max document bytes is {settings.max_document_bytes}. Choose at least 1.")
    if not 0 <= settings.shard_index < settings.num_shards:
        raise DataError(
            f"shard index is {settings.shard_index} of {settings.num_shards} shards. Choose it in [0, number of shards)."
        )
    if not os.path.basename(settings.output_prefix):
        raise DataError(f"the output prefix {settings.output_prefix!r} ends without a name. Add one: data/openwebtext.")
    files = tuple(expand_inputs(settings.inputs, note, lambda name: _is_output(settings.output_prefix, name)))
    if settings.on_error == "stop":
        check_columns(files, settings.json_key)
    settings = _with_split(settings, files, note)
    tokenizer = load_tokenizer(settings.tokenizer, settings.eod_token)
    encode = _encode_settings(settings, tokenizer)
    parts = plan_parts(settings.output_prefix, files, encode, _limits(settings), tokenizer.fingerprint)
    endings = ("_train", "_validation") if settings.validation_fraction else ("",)
    plan = Plan(settings, tokenizer, files, tuple(parts), endings, key_of([part.key for part in parts]))
    for prefix in plan.prefixes.values():
        check_replaceable(prefix)
    return plan


def _with_split(settings: PreprocessSettings, files: Sequence[Path], note: Callable[[str], None]) -> PreprocessSettings:
    """The settings with a decision on what is held out."""
    if settings.split_by is not None or not settings.validation_fraction:
        return settings
    if not is_one_document(files, _limits(settings)):
        return replace(settings, split_by="documents")
    note(f"{files[0]}: holds one document, of which {100 * settings.validation_fraction:.3g} % are held out, in blocks")
    return replace(settings, split_by="blocks")


def _is_output(prefix: str, name: str) -> bool:
    """Whether a preparation under `prefix` writes what is called `name`, its parts included."""
    start, path = os.path.realpath(prefix), os.path.realpath(name)
    return path.startswith(start) and _OUTPUT.fullmatch(path[len(start) :]) is not None


def _check_replaceable(plan: Plan) -> None:
    """Raise `DataError` when the output would take the place of other data than this work's own, cut off or damaged."""
    outputs = (name(prefix) for prefix in plan.prefixes.values() for name in (data_file, index_file))
    path = next(filter(Path.exists, outputs), None)
    if path is None or plan.settings.replace or read_report(plan.report_path, plan.key) is not None:
        return
    if _obstacle(plan):  # with all parts there, a merge of ours was cut off
        raise DataError(
            f"{path}: is there already and not what these inputs and settings give. Choose another prefix, or have it "
            f"replaced with --replace."
        )


def _merge_if_possible(plan: Plan, progress: ProgressDisplay, *, insist: bool) -> dict[str, CorpusSummary]:
    """Make the output out of the parts and delete them; nothing when parts are missing or another process does it.

    `insist`: these two are a `DataError`.
    """
    try:
        with (
            file_errors(DataError, plan.settings.output_prefix, REMEDY),
            file_lock(plan.folder / "merge.lock", patience_seconds=0.5) as held,
        ):
            summaries = _finished(plan)
            if summaries is None:
                problem = _obstacle(plan) if held else "another process is merging the parts"
                if problem and insist:
                    raise DataError(f"{plan.folder}: {problem}.")
                if problem:
                    progress.note(f"{plan.folder}: {problem}")
                    return {}
                summaries = _merge(plan)
            if held:  # other settings may have parts there as well
                for part in plan.parts:
                    part.discard()
            _note_remarks(plan, progress)
            return summaries
    finally:
        _remove_if_empty(plan.folder)


def _obstacle(plan: Plan) -> str:
    """Why it is too early to merge; empty when it is not."""
    missing = [part for part in plan.parts if part.report() is None]
    if not missing:
        return ""
    return f"{len(missing)} of {len(plan.parts)} parts are still to be prepared, the first from {missing[0].files[0]}"


def _merge(plan: Plan) -> dict[str, CorpusSummary]:
    report = Report({ending: SplitCounts() for ending in plan.endings})
    for part in plan.parts:
        of_part = part.report()
        assert of_part is not None
        report.add(of_part)
    for ending, prefix in plan.prefixes.items():
        if report.splits[ending].documents == 0:
            for part in plan.parts:
                part.discard()
            raise DataError(
                f"{prefix}: got none of the {report.documents} documents of {len(plan.files)} files ({report.empty} "
                f"empty, {report.bad} skipped). {_remedy_for_nothing(plan, report)}"
            )
    try:
        for ending, prefix in plan.prefixes.items():
            merge_pairs([part.prefix(ending) for part in plan.parts], prefix, plan.tokenizer.vocab_size)
        # Before the token files get their names: a kill in between leaves counts that the reader sees to disagree,
        # whereas token files without a summary would be read unchecked.
        for ending, prefix in plan.prefixes.items():
            write_summary(prefix, _summary(plan, report, ending))
            publish_pair(prefix)
    finally:
        for prefix in plan.prefixes.values():
            for path in (data_file(prefix), index_file(prefix)):
                partial_path(path).unlink(missing_ok=True)
    write_report(plan.report_path, report, plan.key, [str(path) for path in plan.files])
    summaries = _finished(plan)
    assert summaries is not None, plan.settings.output_prefix
    return summaries


def _remedy_for_nothing(plan: Plan, report: Report) -> str:
    """What to do when a prefix would hold no document."""
    if report.documents == 0:
        return "Give files with text in them."
    if plan.settings.split_by == "blocks":
        return "Give more text."
    return (
        "Each document goes to one side whole, by its hash: hold out a part of each instead with --split-by blocks, or "
        "give more documents or another --validation-fraction."
    )


def _summary(plan: Plan, report: Report, ending: str) -> CorpusSummary:
    counts = report.splits[ending]
    return CorpusSummary(
        documents=counts.documents,
        tokens=counts.tokens,
        bytes=counts.bytes,
        max_token_id=counts.max_token_id,
        tokenizer_fingerprint=plan.tokenizer.fingerprint,
        vocab_size=plan.tokenizer.vocab_size,
        eod_id=plan.tokenizer.eod_id,
        files=tuple(str(path) for path in plan.files),
        skipped_records=report.bad,
        empty_documents=report.empty,
        lost_characters=report.loss.characters,
        tokenizer_content=tokenizer_identity(plan.settings.tokenizer).content,
    )


def _finished(plan: Plan) -> dict[str, CorpusSummary] | None:
    """The summaries of the output, when it is this very work's and whole."""
    if read_report(plan.report_path, plan.key) is None:
        return None
    summaries = {}
    for prefix in plan.prefixes.values():
        try:
            dataset = IndexedDataset(prefix)
        except DataError:
            return None
        summary = read_summary(prefix)
        counts = (dataset.num_documents, dataset.num_tokens)
        if summary is None or (summary.documents, summary.tokens) != counts:
            return None
        summaries[prefix] = summary
    return summaries


def _note_remarks(plan: Plan, progress: ProgressDisplay) -> None:
    report = read_report(plan.report_path, plan.key)
    for remark in report.remarks() if report else ():
        progress.note(f"{plan.settings.output_prefix}: {remark}, see {plan.report_path}")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _encode_settings(settings: PreprocessSettings, tokenizer: Tokenizer) -> EncodeSettings:
    return EncodeSettings(
        settings.tokenizer, settings.json_key, settings.validation_fraction, tokenizer.eod_id, settings.keep_lossy,
        blocks=settings.split_by == "blocks",
    )  # fmt: skip


def _limits(settings: PreprocessSettings) -> ReadLimits:
    return ReadLimits(settings.json_key, settings.max_document_bytes)


def _job(plan: Plan) -> PartJob:
    settings = plan.settings
    return PartJob(
        encode=_encode_settings(settings, plan.tokenizer),
        limits=_limits(settings),
        on_error=settings.on_error,
        vocab_size=plan.tokenizer.vocab_size,
        endings=plan.endings,
    )
