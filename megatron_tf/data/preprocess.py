"""Text files to a pair of token files, over several processes. The output does not depend on their number.

The parent reads lines, the workers parse, split and encode them in batches, and the parent writes the batches in the
order in which it read them.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

import numpy as np

from megatron_tf.data.indexed import IndexedWriter
from megatron_tf.data.records import BadRecord, RawRecord, bad_record_error, expand_inputs, parse_record, read_records
from megatron_tf.data.summary import CorpusSummary, check_replaceable, write_summary
from megatron_tf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tf.errors import DataError

BATCH_DOCUMENTS = 512
BATCH_BYTES = 1 << 20
BATCHES_AHEAD_PER_WORKER = 4  # bounds the memory: reading is faster than encoding


@dataclass(frozen=True)
class PreprocessSettings:
    inputs: tuple[str, ...]  # files and globs
    tokenizer: str
    output_prefix: str
    json_key: str = "text"  # field of a .jsonl line that holds the document
    workers: int = 1  # processes that encode; 1 encodes in this one
    on_error: Literal["fatal", "skip"] = "fatal"  # what a record without text does
    validation_fraction: float = 0.0  # share of documents, by hash of their text, that goes to PREFIX_validation


@dataclass(frozen=True)
class EncodedBatch:
    """What a worker sends back: D documents, their tokens one after another."""

    token_ids: np.ndarray  # int32 [tokens], each document ends with the end-of-document token
    lengths: np.ndarray  # int64 [D], tokens
    text_bytes: np.ndarray  # int64 [D], UTF-8
    held_out: np.ndarray  # bool [D]
    num_empty: int
    bad_records: list[tuple[str, int, str]]  # file, line, reason


@dataclass
class Progress:
    """Counts and shows them: one line that is rewritten on a terminal, a line every ten seconds elsewhere."""

    stream: TextIO
    clock: Callable[[], float] = time.monotonic
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    skipped: int = 0
    _started: float = field(init=False)
    _shown: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self._shown = self.clock()

    def advance(self, batch: EncodedBatch) -> None:
        self.documents += batch.lengths.size
        self.text_bytes += int(batch.text_bytes.sum())
        self.tokens += int(batch.lengths.sum())
        self.skipped += len(batch.bad_records)
        if self.clock() - self._shown >= (0.5 if self.stream.isatty() else 10.0):
            self._shown = self.clock()
            self._print(end="\r" if self.stream.isatty() else "\n")

    def finish(self) -> None:
        self._print(end="\n")

    def _print(self, end: str) -> None:
        seconds = max(self.clock() - self._started, 1e-9)
        print(
            f"{self.documents} documents ({self.documents / seconds:.0f}/s), {self.text_bytes / 1e6:.1f} MB "
            f"({self.text_bytes / 1e6 / seconds:.2f} MB/s), {self.tokens} tokens ({self.tokens / seconds:.0f}/s), "
            f"{self.skipped} skipped",
            end=end,
            file=self.stream,
            flush=True,
        )


def preprocess(settings: PreprocessSettings, progress: Progress) -> dict[str, CorpusSummary]:
    """Encode the inputs; returns the summary of each prefix written.

    Writes PREFIX.bin, .idx, .json, or with a validation fraction those of PREFIX_train and PREFIX_validation. Raises
    `DataError` for every mistake in the inputs; nothing of the output is then changed.
    """
    if not 0 <= settings.validation_fraction < 1:
        raise DataError(f"validation fraction is {settings.validation_fraction}. Choose it in [0, 1).")
    if settings.workers < 1:
        raise DataError(f"the number of workers is {settings.workers}. Choose at least 1.")
    paths = expand_inputs(settings.inputs)
    tokenizer = load_tokenizer(settings.tokenizer)
    endings = ("_train", "_validation") if settings.validation_fraction else ("",)
    prefixes = [settings.output_prefix + ending for ending in endings]
    for prefix in prefixes:
        check_replaceable(prefix)
    try:
        return _write(settings, paths, tokenizer, prefixes, progress)
    except BrokenProcessPool:
        raise DataError("a worker was killed, most likely for want of memory. Use fewer workers.") from None
    except OSError as error:
        where = error.filename or settings.output_prefix
        raise DataError(f"{where}: {error.strerror}. Free space or mend the permissions, then run again.") from None


def _write(
    settings: PreprocessSettings, paths: list[Path], tokenizer: Tokenizer, prefixes: list[str], progress: Progress
) -> dict[str, CorpusSummary]:
    text_bytes, num_empty = [0] * len(prefixes), 0
    with ExitStack() as stack:
        writers = [stack.enter_context(IndexedWriter(prefix, tokenizer.vocab_size)) for prefix in prefixes]
        for batch in encode_all(settings, batches(read_records(paths))):
            if batch.bad_records and settings.on_error == "fatal":
                raise bad_record_error(*batch.bad_records[0])
            for bad in batch.bad_records:
                print("skipped {}:{}: {}".format(*bad), file=progress.stream)
            num_empty += batch.num_empty
            documents = np.split(batch.token_ids, np.cumsum(batch.lengths)[:-1]) if batch.lengths.size else []
            for ids, size, held_out in zip(documents, batch.text_bytes, batch.held_out, strict=True):
                writers[int(held_out)].add_document(ids)
                text_bytes[int(held_out)] += int(size)
            progress.advance(batch)
        progress.finish()
        summaries = {}
        for writer, size in zip(writers, text_bytes, strict=True):
            if writer.num_documents == 0:
                raise DataError(
                    f"{writer.prefix}: got none of the {progress.documents} documents of {len(paths)} files "
                    f"({num_empty} empty, {progress.skipped} skipped). Give more text or another validation fraction."
                )
            summaries[writer.prefix] = CorpusSummary(
                documents=writer.num_documents,
                tokens=writer.num_tokens,
                bytes=size,
                max_token_id=writer.max_token_id,
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                eod_id=tokenizer.eod_id,
                files=tuple(str(path) for path in paths),
                skipped_records=progress.skipped,
                empty_documents=num_empty,
            )
        # Before the token files get their names: a kill in between leaves counts that the reader sees to disagree,
        # whereas token files without a summary would be read unchecked.
        for prefix, summary in summaries.items():
            write_summary(prefix, summary)
    return summaries


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


def encode_all(settings: PreprocessSettings, groups: Iterable[list[RawRecord]]) -> Iterator[EncodedBatch]:
    """Each group encoded, in order, with a bounded number of groups in the workers' hands."""
    encode = functools.partial(encode_group, settings.tokenizer, settings.json_key, settings.validation_fraction)
    if settings.workers == 1:
        yield from map(encode, groups)
        return
    # spawn: forked children would inherit the tokenizer library's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.workers, mp_context=context, initializer=_use_one_thread) as pool:
        waiting: deque[Future[EncodedBatch]] = deque()
        try:
            for group in groups:
                waiting.append(pool.submit(encode, group))
                if len(waiting) >= BATCHES_AHEAD_PER_WORKER * settings.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def encode_group(tokenizer: str, json_key: str, validation_fraction: float, group: list[RawRecord]) -> EncodedBatch:
    """Parse and encode one group. Bad records are returned, not raised: the parent decides, in reading order."""
    encoder = _loaded_tokenizer(tokenizer)
    texts: list[str] = []
    bad_records = []
    for record in group:
        try:
            texts.append(parse_record(record, json_key))
        except BadRecord as problem:
            bad_records.append((record.file, record.line, str(problem)))
    full_texts = [text for text in texts if text]
    raw_texts = [text.encode("utf-8") for text in full_texts]
    encoded = [ids + [encoder.eod_id] for ids in encoder.encode_batch(full_texts)] if full_texts else []
    arrays = [np.asarray(ids, dtype=np.int32) for ids in encoded]
    return EncodedBatch(
        token_ids=np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32),
        lengths=np.array([len(ids) for ids in encoded], dtype=np.int64),
        text_bytes=np.array([len(raw) for raw in raw_texts], dtype=np.int64),
        held_out=np.array([is_held_out(raw, validation_fraction) for raw in raw_texts], dtype=bool),
        num_empty=len(texts) - len(full_texts),
        bad_records=bad_records,
    )


def is_held_out(name: bytes, fraction: float) -> bool:
    """Whether a document belongs to the held-out share: a function of `name` alone, true for `fraction` of all names.

    With the text as the name, copies of a document are never on both sides.
    """
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") < fraction * 2**64


@functools.cache
def _loaded_tokenizer(path: str) -> Tokenizer:
    """One tokenizer a process: workers get a path, since loading is dearer than encoding a batch."""
    return load_tokenizer(path)


def _use_one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
