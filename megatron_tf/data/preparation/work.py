"""Carries out a preparation of text or images: its parts are written, by one run or by several, and then merged.

The output depends on the inputs and on the settings that decide what a document is, but not on the number of processes,
on which of them wrote which part, or on how often the work was interrupted.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from megatron_tf.data.indexed import IndexedDataset, data_file, index_file, publish_pair
from megatron_tf.data.preparation.lanes import write_parts
from megatron_tf.data.preparation.merge import merge_pairs
from megatron_tf.data.preparation.part_writer import PartJob
from megatron_tf.data.preparation.parts import Part, key_of
from megatron_tf.data.preparation.progress import DOCUMENTS, ProgressDisplay
from megatron_tf.data.preparation.report import Report, SplitCounts, read_report, write_report
from megatron_tf.durable import file_lock, partial_path, prepare_output
from megatron_tf.errors import DataError, write_errors
from megatron_tf.telemetry.text import are, count_of

REMEDY = "Choose another prefix, and begin anew. Run again with this one, and finished parts are kept."
Summary = TypeVar("Summary")
_OUTPUT = re.compile(r"\.parts(/.*)?|((_train|_validation)?\.(bin|idx|json)|\.report\.json)(\.partial)?", re.DOTALL)


@dataclass(frozen=True)
class Share:
    """The share of one run in a preparation: shard `shard_index` of `num_shards`, with `workers` processes."""

    workers: int = 1
    shard_index: int = 0
    num_shards: int = 1


@dataclass(frozen=True)
class Preparation(ABC, Generic[Summary]):
    """A preparation whose settings and inputs have been checked, and of which nothing has been read yet."""

    output_prefix: str
    files: tuple[Path, ...]
    parts: tuple[Part, ...]  # of all shards, in the order in which they are merged
    endings: tuple[str, ...]  # of the prefixes that are written
    job: PartJob
    replace: bool  # replace other data under the prefix, which otherwise are an error
    unit: ClassVar[str] = DOCUMENTS

    @abstractmethod
    def write_summary(self, prefix: str, report: Report, ending: str) -> None:
        """Write PREFIX.json with the counts of `ending` in `report`."""

    @abstractmethod
    def read_summary(self, prefix: str) -> tuple[Summary, tuple[int, int]] | None:
        """(summary in PREFIX.json, (its documents, its tokens)); None when there is none."""

    @abstractmethod
    def remedy_for_nothing(self, report: Report) -> str:
        """The remedy, as a sentence, when a prefix would hold no document."""

    def remarks(self) -> Iterator[str]:
        """Remarks to show before the work begins."""
        return iter(())

    @property
    def key(self) -> str:
        """Name of the work, the same for all runs that may share it."""
        return key_of([part.key for part in self.parts])

    @property
    def prefixes(self) -> dict[str, str]:
        """Ending -> prefix."""
        return {ending: self.output_prefix + ending for ending in self.endings}

    @property
    def report_path(self) -> Path:
        return Path(f"{self.output_prefix}.report.json")

    @property
    def folder(self) -> Path:
        """The folder of the parts, PREFIX.parts."""
        return self.parts[0].folder


def check_share(share: Share, output_prefix: str) -> None:
    """DataError for numbers out of range, and for a prefix that ends without a name."""
    if share.workers < 1:
        raise DataError(f"--workers is {share.workers}. Choose at least 1.")
    if not 0 <= share.shard_index < share.num_shards:
        raise DataError(
            f"shard index is {share.shard_index} of {share.num_shards} shards. Choose it in [0, number of shards)."
        )
    if not os.path.basename(output_prefix):
        raise DataError(f"the output prefix {output_prefix!r} ends without a name. Add one: data/openwebtext.")


def is_output(prefix: str, name: str) -> bool:
    """Whether `name` is a file that a preparation under `prefix` writes, its parts included."""
    start, path = os.path.realpath(prefix), os.path.realpath(name)
    return path.startswith(start) and _OUTPUT.fullmatch(path[len(start) :]) is not None


def carry_out(work: Preparation[Summary], share: Share, progress: ProgressDisplay) -> dict[str, Summary]:
    """Write the parts of `share` that are not finished, and merge when the parts of all shards are.

    Returns the summary by prefix; {} when other shards have not finished. Output of the same work is kept as it is.
    Raises `DataError` for a mistake in the inputs, and for other data under the prefix unless they may be replaced;
    older output is then unchanged.
    """
    own = work.parts[share.shard_index :: share.num_shards]
    # The parts first: another run that merges them writes the output and then removes them.
    todo = _missing(own)
    summaries = _finished(work)
    if summaries is not None:
        progress.note(f"{work.output_prefix}: was prepared from the same files with the same settings before")
        _note_remarks(work, progress)
        return summaries
    check_others(work)
    for remark in work.remarks():
        progress.note(remark)
    if len(todo) < len(own):
        progress.note(f"finished before: {len(own) - len(todo)} of {count_of(len(own), 'part')}")
    for prefix in work.prefixes.values():
        prepare_output(index_file(prefix))
    progress.start(sum(part.bytes for part in todo), work.unit)
    try:
        busy = write_parts(work.job, todo, share.workers, progress)
    finally:
        progress.stop()
        _remove_if_empty(work.folder)
    if busy:
        progress.note(f"{count_of(len(busy), 'part')} {are(len(busy))} in the hands of other processes")
    return _merge_if_possible(work, progress, insist=share.num_shards == 1 and not busy)


def merge_only(work: Preparation[Summary], progress: ProgressDisplay) -> dict[str, Summary]:
    """Merge the parts. Returns the summaries as `carry_out` does. Raises `DataError` when parts are missing."""
    check_others(work)
    return _merge_if_possible(work, progress, insist=True)


def check_others(work: Preparation[Summary]) -> None:
    """Raise `DataError` when the output would replace other data than this work's own, truncated or damaged output."""
    outputs = (name(prefix) for prefix in work.prefixes.values() for name in (data_file, index_file))
    path = next(filter(Path.exists, outputs), None)
    if path is None or work.replace:
        return
    # When all parts are there, the output is from our own interrupted merge. The report is read after them, because
    # another run may just be merging: it writes the report and then removes the parts.
    if _missing(work.parts) and read_report(work.report_path, work.key) is None:
        raise DataError(
            f"{path}: is there already and not what these inputs and settings give. Choose another prefix, or have it "
            f"replaced with --replace."
        )


def _merge_if_possible(work: Preparation[Summary], progress: ProgressDisplay, *, insist: bool) -> dict[str, Summary]:
    """Merge the parts and delete them; returns the summaries by prefix.

    When parts are missing or another process is merging them: `DataError` with `insist`, else a note and {}.
    """
    try:
        while True:
            missing: Sequence[Part] = ()
            with (
                write_errors(DataError, work.output_prefix, REMEDY),
                file_lock(work.folder / "merge.lock", patience_seconds=0.5) as held,
            ):
                summaries = _finished(work)
                if summaries is None and held and not (missing := _missing(work.parts)):
                    summaries = _merge(work)
                if summaries is not None:
                    if held:  # not the whole folder: parts of other settings may be there as well
                        for part in work.parts:
                            part.discard()
                    _note_remarks(work, progress)
                    return summaries
            # A run that finished the last part while we held the lock has left the merge to us.
            if held and (not _missing(missing) or _finished(work) is not None):
                continue
            problem = _obstacle(work, missing) if held else "another process is merging the parts"
            if insist:
                raise DataError(f"{work.folder}: {problem}.")
            progress.note(f"{work.folder}: {problem}")
            return {}
    finally:
        _remove_if_empty(work.folder)


def _missing(parts: Sequence[Part]) -> list[Part]:
    """Those that are not finished."""
    return [part for part in parts if part.report() is None]


def _obstacle(work: Preparation[Summary], missing: Sequence[Part]) -> str:
    """Why it is too early to merge."""
    parts = f"{len(missing)} of {count_of(len(work.parts), 'part')}"
    return f"{parts} {are(len(missing))} still to be prepared, the first from {missing[0].files[0]}"


def _merge(work: Preparation[Summary]) -> dict[str, Summary]:
    report = Report({ending: SplitCounts() for ending in work.endings})
    for part in work.parts:
        of_part = part.report()
        assert of_part is not None
        report.add(of_part)
    for ending, prefix in work.prefixes.items():
        if report.splits[ending].documents == 0:
            for part in work.parts:
                part.discard()
            raise DataError(
                f"{prefix}: got none of {count_of(report.documents, work.unit.removesuffix('s'))} of "
                f"{count_of(len(work.files), 'file')} ({report.empty} empty, {report.bad} skipped). "
                f"{work.remedy_for_nothing(report)}"
            )
    try:
        for ending, prefix in work.prefixes.items():
            merge_pairs([part.prefix(ending) for part in work.parts], prefix, work.job.vocab_size, work.job.code)
        # The summary comes first: if we are killed in between, its counts disagree with the token files, which readers
        # notice. Token files without a summary would be read unchecked.
        for ending, prefix in work.prefixes.items():
            work.write_summary(prefix, report, ending)
            publish_pair(prefix)
    finally:
        for prefix in work.prefixes.values():
            for path in (data_file(prefix), index_file(prefix)):
                partial_path(path).unlink(missing_ok=True)
    write_report(work.report_path, report, work.key, [str(path) for path in work.files])
    summaries = _finished(work)
    assert summaries is not None, work.output_prefix
    return summaries


def _finished(work: Preparation[Summary]) -> dict[str, Summary] | None:
    """The summaries by prefix, if the output is there, whole, and of this very work; else None."""
    if read_report(work.report_path, work.key) is None:
        return None
    summaries = {}
    for prefix in work.prefixes.values():
        try:
            dataset = IndexedDataset(prefix)
        except DataError:
            return None
        found = work.read_summary(prefix)
        if found is None or found[1] != (dataset.num_documents, dataset.num_tokens):
            return None
        summaries[prefix] = found[0]
    return summaries


def _note_remarks(work: Preparation[Summary], progress: ProgressDisplay) -> None:
    report = read_report(work.report_path, work.key)
    for remark in report.remarks() if report else ():
        progress.note(f"{work.output_prefix}: {remark}, see {work.report_path}")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
