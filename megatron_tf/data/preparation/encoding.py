"""The work of an encoding process: batches of records become batches of tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tf.data.losses import Loss, LossFinder
from megatron_tf.data.preparation.long_texts import encode_long, is_long
from megatron_tf.data.preparation.record_types import BadRecord, BadSample, KeptSample, RawRecord
from megatron_tf.data.preparation.records import parse_record
from megatron_tf.data.preparation.split import is_held_out, split_blocks
from megatron_tf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tf.data.tokenizer_files import is_library_failure

EXCERPT_BYTES = 120


@dataclass(frozen=True)
class EncodeSettings:
    tokenizer: str  # as `load_tokenizer` takes it
    json_key: str
    validation_fraction: float  # share that is held out: of the documents or, with `blocks`, of each document
    eod_id: int | None = None  # token that ends a document; None: the tokenizer's, found by the usual names
    keep_lossy: bool = False  # keep documents of which the tokenizer loses characters; otherwise they are bad
    blocks: bool = False  # hold out blocks of each document, whose segments become documents


@dataclass(frozen=True)
class EncodedBatch:
    """The result of a worker: D documents, their tokens one after another."""

    token_ids: np.ndarray  # int32 [tokens], each document ends with the end-of-document token
    lengths: np.ndarray  # int64 [D], tokens
    text_bytes: np.ndarray  # int64 [D], UTF-8
    held_out: np.ndarray  # bool [D]
    bad_records: tuple[BadSample, ...]
    kept: tuple[KeptSample, ...]  # remarks about the D documents
    loss: Loss  # characters of the D documents that the tokenizer lost


def encode_group(settings: EncodeSettings, group: Sequence[RawRecord]) -> EncodedBatch:
    """Parse and encode a group. Bad records are returned, not raised, so that they are handled in reading order."""
    tokenizer, losses = _loaded_tokenizer(settings.tokenizer, settings.eod_id)
    bad_records: list[tuple[int, BadSample]] = []  # with the place in the group
    texts: list[tuple[int, str, bool]] = []  # with the place, and whether it is held out
    for place, record in enumerate(group):
        try:
            text = parse_record(record, settings.json_key)
            texts += [(place, segment, held) for segment, held in _segments(settings, text)]
        except BadRecord as problem:
            bad_records.append((place, _sample(record, problem)))
    arrays: list[np.ndarray] = []
    lengths, text_bytes, held_out = [], [], []
    kept, total = [], Loss()
    end = np.array([tokenizer.eod_id], dtype=np.int32)
    for (place, text, held), encoded in zip(texts, _encode(tokenizer, [text for _, text, _ in texts]), strict=True):
        record = group[place]
        if isinstance(encoded, BadRecord):
            bad_records.append((place, _sample(record, encoded)))
            continue
        loss = losses.find(text, encoded)
        if loss.visible and not settings.keep_lossy:
            bad_records.append((place, _sample(record, BadRecord("lost_text", f"the tokenizer loses {loss} of it"))))
            continue
        if loss:
            total.add(loss)
            kept.append(KeptSample("lost_text", record.file, record.line, f"the tokenizer loses {loss} of it"))
        if len(encoded) == 1 and is_long(text):
            kept.append(KeptSample("encoded_whole", record.file, record.line, f"{len(text):,} characters at once"))
        arrays += [*encoded, end]
        lengths.append(sum(ids.size for ids in encoded) + 1)
        text_bytes.append(len(text) if text.isascii() else len(text.encode("utf-8")))
        held_out.append(held)
    texts.clear()  # frees memory: concatenating holds all tokens twice
    bad_records.sort()
    return EncodedBatch(
        token_ids=np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32),
        lengths=np.array(lengths, dtype=np.int64),
        text_bytes=np.array(text_bytes, dtype=np.int64),
        held_out=np.array(held_out, dtype=bool),
        bad_records=tuple(sample for _, sample in bad_records),
        kept=tuple(kept),
        loss=total,
    )


def _segments(settings: EncodeSettings, text: str) -> list[tuple[str, bool]]:
    """(document, whether it is held out) for each document that `text` becomes."""
    if settings.blocks and settings.validation_fraction:
        return split_blocks(text, settings.validation_fraction)
    return [(text, settings.validation_fraction > 0 and is_held_out(text.encode(), settings.validation_fraction))]


def _sample(record: RawRecord, problem: BadRecord) -> BadSample:
    excerpt = record.payload[:EXCERPT_BYTES].decode("utf-8", errors="backslashreplace")
    return BadSample(problem.kind, record.file, record.line, problem.reason, excerpt)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[np.ndarray] | BadRecord]:
    """Yields for each text its tokens, int32 [n] (a long text's in several arrays), or why it has none."""
    short = [text for text in texts if not is_long(text)]
    try:
        together = iter(tokenizer.encode_arrays(short))
    except BaseException as error:
        if not is_library_failure(error):
            raise
        yield from (_encode_alone(tokenizer, text) for text in texts)  # one of them: find out which
        return
    for text in texts:
        yield _encode_alone(tokenizer, text) if is_long(text) else [next(together)]


def _encode_alone(tokenizer: Tokenizer, text: str) -> list[np.ndarray] | BadRecord:
    try:
        return (encode_long(tokenizer, text) if is_long(text) else None) or tokenizer.encode_arrays([text])
    except BaseException as error:
        if not is_library_failure(error):
            raise
        return BadRecord("not_encodable", f"the tokenizer fails on it ({type(error).__name__}: {error})")


@functools.cache
def _loaded_tokenizer(name: str, eod_id: int | None) -> tuple[Tokenizer, LossFinder]:
    """One tokenizer per process: workers get its name and load it once, because loading takes longer than a batch."""
    tokenizer = load_tokenizer(name, eod_id)
    return tokenizer, LossFinder(tokenizer)
