"""Writes one part of a preparation: from its input files to its token files and its report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from megatron_tf.data.indexed import IndexedWriter
from megatron_tf.data.preparation.encoding import EncodedBatch
from megatron_tf.data.preparation.parts import Part
from megatron_tf.data.preparation.progress import Advance, Observer
from megatron_tf.data.preparation.record_types import RawRecord
from megatron_tf.data.preparation.report import Report, SplitCounts, write_report
from megatron_tf.data.preparation.workers import Encode, EncodeAll
from megatron_tf.durable import file_lock
from megatron_tf.errors import DataError, write_errors

BATCH_DOCUMENTS = 512
BATCH_BYTES = 1 << 16  # small, so that workers end a part at about the same time

OnError = Literal["stop", "skip"]


class Read(Protocol):
    """Yields the records of the files, in order. `on_read` is told how many bytes of the files were read."""

    def __call__(self, paths: Iterable[Path], *, on_read: Callable[[int], None]) -> Iterator[RawRecord]: ...


@dataclass(frozen=True)
class PartJob:
    """The settings that all parts of a preparation share."""

    read: Read
    encode: Encode
    on_error: OnError
    vocab_size: int
    code: int  # of the integer type in which tokens are written, see `data.indexed`
    endings: tuple[str, ...]  # of the written prefixes: ("",) for all documents, or ("_train", "_validation")


def write_part(job: PartJob, part: Part, encode_all: EncodeAll, observer: Observer) -> bool:
    """Write the part unless it is finished; False when another process is at work on it.

    Raises `DataError` for a bad record under `on_error="stop"`; what was written of this part is then gone.
    """
    remedy = "Choose another prefix, and begin anew. Run again with this one, and finished parts are kept."
    with write_errors(DataError, part.folder, remedy), file_lock(part.lock_path) as held:
        if not held:
            return False
        if part.report() is not None:  # finished while we waited for the lock
            return True
        report = _write(job, part, encode_all, observer)
        write_report(part.report_path, report, part.key, [str(path) for path in part.files])
        return True


def _write(job: PartJob, part: Part, encode_all: EncodeAll, observer: Observer) -> Report:
    started = time.monotonic()
    num_read = 0

    def on_read(num_bytes: int) -> None:
        nonlocal num_read
        num_read += num_bytes

    report = Report({ending: SplitCounts() for ending in job.endings})
    groups = batches(job.read(part.files, on_read=on_read))
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedWriter(part.prefix(ending), job.vocab_size, job.code)) for ending in job.endings
        ]
        for batch in encode_all(job.encode, groups):
            _take_bad_records(job, batch, report, observer)
            report.add_kept(batch.kept, batch.loss)
            for number, (ending, writer) in enumerate(zip(job.endings, writers, strict=True)):
                _add(batch, batch.held_out == bool(number), writer, report.splits[ending])
            advance = Advance(batch.lengths.size, int(batch.text_bytes.sum()), batch.token_ids.size, num_read)
            num_read = 0
            observer.advance(advance)
    for ending, writer in zip(job.endings, writers, strict=True):
        report.splits[ending].max_token_id = writer.max_token_id
    report.seconds = time.monotonic() - started
    return report


def _take_bad_records(job: PartJob, batch: EncodedBatch, report: Report, observer: Observer) -> None:
    if batch.bad_records and job.on_error == "stop":
        first = batch.bad_records[0]
        remedy = "Correct or remove the record, or leave out what is bad with --on-error skip."
        if first.kind == "lost_text":
            remedy = (
                "Use a tokenizer that knows them, keep such documents without them with --keep-lossy, or leave out "
                "what is bad with --on-error skip."
            )
        raise DataError(f"{first.file}:{first.line}: {first.reason}. {remedy}")
    report.add_bad(batch.bad_records)
    for sample in batch.bad_records:
        observer.bad_record(sample)


def _add(batch: EncodedBatch, chosen: np.ndarray, writer: IndexedWriter, counts: SplitCounts) -> None:
    """Writes and counts the documents of a batch that are `chosen` (bool [D])."""
    lengths = batch.lengths[chosen]
    ids = batch.token_ids if chosen.all() else batch.token_ids[np.repeat(chosen, batch.lengths)]
    writer.add_documents(ids, lengths)
    counts.documents += lengths.size
    counts.tokens += ids.size
    counts.bytes += int(batch.text_bytes[chosen].sum())


def batches(records: Iterable[RawRecord]) -> Iterator[list[RawRecord]]:
    """Records in order, in groups of at most `BATCH_DOCUMENTS`, closed as soon as they exceed `BATCH_BYTES`."""
    group: list[RawRecord] = []
    size = 0
    for record in records:
        group.append(record)
        size += len(record.payload)
        if len(group) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
