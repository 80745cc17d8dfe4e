"""The cost of opening a corpus, measured on sparse files of any size that take no room on the disk."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.indexed import HEADER, data_file, index_file, pack_header, token_type
from megatron_tf.data.loader import build_dataset
from megatron_tf.data.summary import CorpusSummary, write_summary
from megatron_tf.errors import DataError, file_errors
from megatron_tf.paths import literal
from megatron_tf.telemetry.memory import resident_bytes

VOCAB_SIZE = 50_304
OPENINGS = 5  # of which the quickest counts: the others were disturbed
SAMPLES = 200  # read at random places after the opening


@dataclass(frozen=True)
class OpeningCost:
    documents: int
    tokens: int
    index_bytes: int
    open_seconds: float  # until the first sample could be asked for
    open_bytes: int  # by which the process grew
    sample_seconds: float  # of one sample at a random place whose page is in memory
    sampled_bytes: int  # by which the process had grown after all samples


def write_sparse_pair(prefix: Path, documents: int, tokens_per_document: int) -> None:
    """Files as a preparation leaves them, of documents of one length, in which almost all is a hole.

    Only what opening looks at is written: the summary, the header and the last entries. All tokens are 0.
    """
    code, dtype = token_type(VOCAB_SIZE)
    sizes_end = HEADER.size + 4 * documents
    pointers_end = sizes_end + 8 * documents
    with open(index_file(prefix), "wb") as file:
        file.write(pack_header(code, documents))
        for end, value, kind in (
            (sizes_end, tokens_per_document, "<i4"),
            (pointers_end, (documents - 1) * tokens_per_document * dtype.itemsize, "<i8"),
            (pointers_end + 8 * (documents + 1), documents, "<i8"),
        ):
            content = np.array(value, dtype=kind).tobytes()
            file.seek(end - len(content))
            file.write(content)
    with open(data_file(prefix), "wb") as file:
        file.truncate(documents * tokens_per_document * dtype.itemsize)
    tokens = documents * tokens_per_document
    write_summary(
        prefix,
        CorpusSummary(
            documents,
            tokens,
            bytes=tokens,
            max_token_id=0,
            tokenizer_fingerprint="",
            vocab_size=VOCAB_SIZE,
            eod_id=0,
            files=(),
            skipped_records=0,
            empty_documents=0,
        ),
    )


def measure_opening(documents: int, tokens_per_document: int, seq_length: int, folder: Path) -> OpeningCost:
    """Open such a corpus in a fresh process and read some samples. Raises `DataError` when `folder` has no room."""
    with (
        file_errors(DataError, folder, "Choose a folder on a file system that keeps holes in files."),
        tempfile.TemporaryDirectory(dir=folder) as work,
    ):
        prefix = Path(work) / "synthetic"
        write_sparse_pair(prefix, documents, tokens_per_document)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_measure, (str(prefix), seq_length))


def _measure(prefix: str, seq_length: int) -> OpeningCost:
    before, open_seconds = resident_bytes(), []
    for _ in range(OPENINGS):
        started = time.perf_counter()
        dataset = build_dataset([DataSource(path=literal(str(prefix)))], seq_length, seed=1, vocab_size=VOCAB_SIZE)
        open_seconds.append(time.perf_counter() - started)
    open_bytes = resident_bytes() - before
    source = dataset.sources[0]
    indices = np.random.default_rng(0).integers(source.samples_per_epoch, size=SAMPLES).tolist()
    for _ in range(2):  # the second time the pages are in memory, so that the disk does not count
        started = time.perf_counter()
        for index in indices:
            dataset.sample(index)
        sample_seconds = (time.perf_counter() - started) / SAMPLES
    return OpeningCost(
        documents=source.dataset.num_documents,
        tokens=source.dataset.num_tokens,
        index_bytes=index_file(prefix).stat().st_size,
        open_seconds=min(open_seconds),
        open_bytes=max(0, open_bytes),
        sample_seconds=sample_seconds,
        sampled_bytes=max(0, resident_bytes() - before),
    )
