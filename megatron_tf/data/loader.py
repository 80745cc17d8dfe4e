"""From configured data sources to the batches of one data-parallel rank."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.blend import Blend
from megatron_tf.data.documents import LossMask
from megatron_tf.data.indexed import IndexedDataset, data_file, index_file
from megatron_tf.data.samples import TokenSource, derived_seed, samples_of_rank
from megatron_tf.data.summary import read_summary, summary_file
from megatron_tf.data.tokenizer_identity import tokenizer_identity
from megatron_tf.errors import DataError, file_errors
from megatron_tf.open_files import too_many
from megatron_tf.tasks.data import Batch

# The places, from the first byte of a file to its last, that `_sampled` reads, and the bytes at each.
DIGEST_SAMPLES = 16
DIGEST_BYTES = 1 << 12
NOT_COMPARED = " Where you know that both give the same tokens, data.tokenizer=null compares nothing."


def build_dataset(sources: Sequence[DataSource], seq_length: int, seed: int, vocab_size: int) -> Blend:
    """Open all sources and blend them by weight. Costs O(1) a source.

    Raises one `DataError` with the problems of all sources: a file missing or damaged, too few tokens for a sample,
    a summary that belongs to other data, a token id (as far as the summary knows it) of `vocab_size` or more.
    """
    opened, problems = [], []
    for number, source in enumerate(sources):
        try:
            opened.append(_open_source(source.path, seq_length, derived_seed(seed, number), vocab_size))
        except DataError as problem:
            problems.append(str(problem))
            if too_many(problem.__cause__):
                break
    if problems:
        raise DataError("\n".join(problems))
    return Blend(opened, [source.weight for source in sources], seed)


def _open_source(prefix: str, seq_length: int, seed: int, vocab_size: int) -> TokenSource:
    return TokenSource(open_tokens(prefix, vocab_size), seq_length, seed)


def open_tokens(prefix: str, vocab_size: int) -> IndexedDataset:
    """The token files of `prefix`. DataError when they are missing or damaged, when the summary next to them belongs to
    other data, or when it knows of a token id of `vocab_size` or more. Without a summary, as from other programs, the
    whole index is checked, because it may leave documents out."""
    dataset = IndexedDataset(prefix)
    summary = read_summary(prefix)
    if summary is None:
        dataset.check_index()
    else:
        if (summary.documents, summary.tokens) != (dataset.num_documents, dataset.num_tokens):
            raise DataError(
                f"{summary_file(prefix)}: describes {summary.documents} documents and {summary.tokens} tokens, the "
                f"files next to it have {dataset.num_documents} and {dataset.num_tokens}. Prepare the data again."
            )
        if summary.max_token_id >= vocab_size:
            raise _outside_vocabulary(str(data_file(prefix)), summary.max_token_id, vocab_size)
    return dataset


def check_vocabulary(dataset: IndexedDataset, start: int, ids: np.ndarray, vocab_size: int) -> None:
    """DataError, with its place, for an id among `ids`, tokens of `dataset` from `start` on, outside the vocabulary."""
    outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if not outside.size:
        return
    token = start + int(outside[0])
    document = int(np.searchsorted(dataset.document_offsets, token, side="right")) - 1
    place = (
        f"{data_file(dataset.prefix)}: document {document}, token {token - int(dataset.document_offsets[document])} of "
        f"it (token {token} of the file)"
    )
    raise _outside_vocabulary(place, int(ids[outside[0]]), vocab_size)


def _outside_vocabulary(place: str, token_id: int, vocab_size: int) -> DataError:
    if token_id < 0:
        return DataError(
            f"{place}: token id {token_id} is outside the vocabulary, ids are 0 to {vocab_size - 1}. "
            f"The file is damaged or its token type is wrong: prepare the data again."
        )
    return DataError(
        f"{place}: token id {token_id} is beyond the vocabulary, model.vocab_size is {vocab_size}. Raise "
        f"model.vocab_size to at least {token_id + 1}, or prepare the data again (tools/preprocess_data.py) with the "
        "tokenizer of this model."
    )


def check_tokenizer(sources: Sequence[DataSource], tokenizer_path: str | None) -> None:
    """Raise `DataError` when data were made with another tokenizer than the file, or, without one, than each other.

    A file that was written anew and gives the same tokens is the same tokenizer. Sources without a summary (made by
    other programs) cannot be checked.
    """
    expected, origin = None, ""
    if tokenizer_path is not None:
        expected, origin = tokenizer_identity(tokenizer_path), f"data.tokenizer {tokenizer_path}"
    problems = []
    known = [(source, summary) for source in sources if (summary := read_summary(source.path)) is not None]
    # Without data.tokenizer they are compared with each other.
    are_alike = all(summary.tokenizer.same(known[0][1].tokenizer) for _, summary in known)
    for source, summary in known:
        if expected is None:
            expected, origin = summary.tokenizer, source.path
        elif not summary.tokenizer.same(expected):
            problems.append(
                f"{summary_file(source.path)}: the data were made with tokenizer {summary.tokenizer_fingerprint[:12]}, "
                f"{origin} is {expected.file[:12]} (SHA-256). Name the tokenizer of the data or prepare the data again."
                + (NOT_COMPARED if tokenizer_path is not None and are_alike else "")
            )
    if problems:
        raise DataError("\n".join(problems))


def source_names(sources: Sequence[DataSource]) -> list[str]:
    """A name for each source, fit for a metric: the shortest end of its path that tells it from the others.

    Only letters, digits and "._-" are in it. The same path twice gets a number.
    """
    paths = [[re.sub(r"[^\w.-]", "_", part, flags=re.ASCII) for part in Path(s.path).parts] for s in sources]
    names: list[str] = []
    for path in paths:
        depth = 1
        while depth < len(path) and sum(other[-depth:] == path[-depth:] for other in paths) > 1:
            depth += 1
        name = wanted = "_".join(path[-depth:]).strip("_") or "source"
        number = 2
        while name in names:
            name, number = f"{wanted}_{number}", number + 1
        names.append(name)
    return names


def fingerprint(sources: Sequence[DataSource], seed: int) -> dict[str, Any]:
    """The facts that decide the order and content of the samples, as a JSON object. Costs O(1) for each source.

    Of each source: name (without the folder, so that data may move), weight, bytes of both files, a SHA-256 of the
    first and last 64 KiB of its tokens, and one of samples from both files, which tell files of equal size apart.
    Older checkpoints lack the last. Raises `DataError` for a missing file.
    """
    entries = []
    for source in sources:
        dataset = IndexedDataset(source.path)
        path = data_file(source.path)
        with file_errors(DataError, path, "Make it readable or correct the path."):
            entries.append(
                {
                    "name": Path(source.path).name,
                    "weight": source.weight,
                    "tokens": dataset.num_tokens,
                    "bin_bytes": path.stat().st_size,
                    "idx_bytes": index_file(source.path).stat().st_size,
                    "ends_sha256": dataset.ends_digest(),
                    "samples_sha256": _sampled(source.path).hexdigest(),
                }
            )
    return {"seed": seed, "sources": entries}


def content_digest(prefix: str) -> str:
    """The prepared data `prefix` as text: tokens, documents, and a SHA-256 of samples from its files.

    It is equal on nodes with the same data, and differs on a node with a copy of earlier data. Raises `DataError`.
    """
    dataset, summary, digest = IndexedDataset(prefix), read_summary(prefix), _sampled(prefix)
    if summary is not None:
        digest.update(f"{summary.tokenizer_fingerprint}\0{summary.eod_id}\0{summary.bytes}".encode())
    return f"{dataset.num_tokens:,} tokens in {dataset.num_documents:,} documents, SHA-256 {digest.hexdigest()[:12]}"


def _sampled(prefix: str) -> hashlib._Hash:
    """SHA-256 of the sizes of both files, and of DIGEST_SAMPLES places of each."""
    digest = hashlib.sha256()
    for path in (data_file(prefix), index_file(prefix)):
        with file_errors(DataError, path, "Make it readable or correct the path."), open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(f"{size}\0".encode())
            for number in range(DIGEST_SAMPLES):
                file.seek(max(0, size - DIGEST_BYTES) * number // (DIGEST_SAMPLES - 1))
                digest.update(file.read(DIGEST_BYTES))
    return digest


class BatchLoader:
    """Micro batches of one data-parallel rank. Holds no position: what a step reads follows from its first sample."""

    def __init__(
        self,
        dataset: Blend,
        *,
        micro_batch_size: int,
        num_micro_batches: int,
        data_rank: int,
        data_size: int,
        vocab_size: int,
        loss_mask: LossMask | None = None,
    ):
        """`loss_mask`: which labels become IGNORED."""
        assert 0 <= data_rank < data_size and micro_batch_size >= 1 and num_micro_batches >= 1
        self.dataset = dataset
        self.micro_batch_size = micro_batch_size
        self.num_micro_batches = num_micro_batches
        self.data_rank = data_rank
        self.data_size = data_size
        self.vocab_size = vocab_size
        self.loss_mask = loss_mask

    def step_batches(self, first_sample: int) -> Iterator[Batch]:
        """(input_ids, labels), each int64 [micro_batch_size, seq_length], for every micro batch of a step. A label may
        be IGNORED.

        Micro batch m takes samples first_sample + (m·data_size + data_rank)·micro_batch_size + [0, micro_batch_size),
        so a step takes the same samples whatever the layout. Raises `DataError` for an id outside the vocabulary.
        """
        sources, tokens = self.dataset.first_tokens(self._samples(first_sample))
        for first in range(0, len(tokens), self.micro_batch_size):
            rows = np.empty((self.micro_batch_size, self.dataset.seq_length + 1), dtype=np.int64)
            places = [(int(sources[first + row]), int(tokens[first + row])) for row in range(self.micro_batch_size)]
            for row, (source, token) in zip(rows, places):
                self.dataset.sources[source].dataset.read_into(row, token)
            self._check_vocabulary(rows, places)
            ids, labels = rows[:, :-1].copy(), rows[:, 1:].copy()
            if self.loss_mask is not None:
                self.loss_mask.apply(ids, labels)
            yield torch.from_numpy(ids), torch.from_numpy(labels)

    def sample_sources(self, first_sample: int) -> list[int]:
        """Number of the source of each sample of `step_batches`, in their order."""
        return [self.source_of(sample) for sample in self._samples(first_sample)]

    def source_of(self, sample: int) -> int:
        """Number of the source that a sample is of."""
        return self.dataset.locate(sample)[0]

    def _samples(self, first_sample: int) -> list[int]:
        return samples_of_rank(
            first_sample, self.micro_batch_size, self.num_micro_batches, self.data_rank, self.data_size
        )

    def _check_vocabulary(self, rows: np.ndarray, places: Sequence[tuple[int, int]]) -> None:
        """`places`: (source, place in it of the first token) of each row."""
        if rows.min() < 0 or rows.max() >= self.vocab_size:
            row = int(np.argwhere((rows < 0) | (rows >= self.vocab_size))[0, 0])
            source, token = places[row]
            check_vocabulary(self.dataset.sources[source].dataset, token, rows[row], self.vocab_size)
