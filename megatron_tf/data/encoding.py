"""Batches of records to batches of tokens: what a worker does."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tf.data.record_types import BadRecord, BadSample, RawRecord
from megatron_tf.data.records import parse_record
from megatron_tf.data.split import is_held_out
from megatron_tf.data.tokenizer import Tokenizer, load_tokenizer

# A longer document is encoded in pieces: libraries keep tens of bytes a character while they encode.
PIECE_CHARACTERS = 1 << 18
CUT_SEARCH_CHARACTERS = 2000  # how far back from the end of a piece a place to cut is looked for
CUT_CONTEXT_CHARACTERS = 128  # on either side of a cut, over which it is proven to change no token
EXCERPT_BYTES = 120


@dataclass(frozen=True)
class EncodeSettings:
    tokenizer: str  # as `load_tokenizer` takes it
    json_key: str
    validation_fraction: float  # share of documents, by hash of their text, that is held out


@dataclass(frozen=True)
class EncodedBatch:
    """What a worker sends back: D documents, their tokens one after another."""

    token_ids: np.ndarray  # int32 [tokens], each document ends with the end-of-document token
    lengths: np.ndarray  # int64 [D], tokens
    text_bytes: np.ndarray  # int64 [D], UTF-8
    held_out: np.ndarray  # bool [D]
    bad_records: tuple[BadSample, ...]


def encode_group(settings: EncodeSettings, group: Sequence[RawRecord]) -> EncodedBatch:
    """Parse and encode a group. Bad records are returned, not raised: what to do is decided in reading order."""
    tokenizer = _loaded_tokenizer(settings.tokenizer)
    bad_records: list[tuple[int, BadSample]] = []  # with the place in the group
    texts: list[tuple[int, str]] = []
    for place, record in enumerate(group):
        try:
            texts.append((place, parse_record(record, settings.json_key)))
        except BadRecord as problem:
            bad_records.append((place, _sample(record, problem)))
    arrays: list[np.ndarray] = []
    lengths, text_bytes, held_out = [], [], []
    end = np.array([tokenizer.eod_id], dtype=np.int32)
    for (place, text), encoded in zip(texts, _encode(tokenizer, [text for _, text in texts]), strict=True):
        if isinstance(encoded, BadRecord):
            bad_records.append((place, _sample(group[place], encoded)))
            continue
        arrays += [*encoded, end]
        lengths.append(sum(ids.size for ids in encoded) + 1)
        text_bytes.append(len(text) if text.isascii() else len(text.encode("utf-8")))
        held_out.append(settings.validation_fraction > 0 and is_held_out(text.encode(), settings.validation_fraction))
    texts.clear()  # what follows needs the tokens twice
    bad_records.sort()
    return EncodedBatch(
        token_ids=np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int32),
        lengths=np.array(lengths, dtype=np.int64),
        text_bytes=np.array(text_bytes, dtype=np.int64),
        held_out=np.array(held_out, dtype=bool),
        bad_records=tuple(sample for _, sample in bad_records),
    )


def _sample(record: RawRecord, problem: BadRecord) -> BadSample:
    excerpt = record.payload[:EXCERPT_BYTES].decode("utf-8", errors="backslashreplace")
    return BadSample(problem.kind, record.file, record.line, problem.reason, excerpt)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[np.ndarray] | BadRecord]:
    """Tokens of each text, in pieces, or why it has none."""
    short = [text for text in texts if len(text) <= PIECE_CHARACTERS]
    try:
        together = iter(tokenizer.encode_arrays(short))
    except BaseException as error:  # noqa: BLE001 - see _is_library_failure
        if not _is_library_failure(error):
            raise
        yield from (_encode_alone(tokenizer, text) for text in texts)  # one of them: find out which
        return
    for text in texts:
        yield [next(together)] if len(text) <= PIECE_CHARACTERS else _encode_alone(tokenizer, text)


def _encode_alone(tokenizer: Tokenizer, text: str) -> list[np.ndarray] | BadRecord:
    try:
        return [tokenizer.encode_arrays([piece])[0] for piece in pieces(tokenizer, text)]
    except BadRecord as problem:
        return problem
    except BaseException as error:  # noqa: BLE001 - see _is_library_failure
        if not _is_library_failure(error):
            raise
        return BadRecord("not_encodable", f"the tokenizer fails on it ({type(error).__name__}: {error})")


def _is_library_failure(error: BaseException) -> bool:
    """A panic in a library written in Rust is no `Exception`, but one text of millions must not end the work."""
    return (isinstance(error, Exception) and not isinstance(error, MemoryError)) or (
        type(error).__name__ == "PanicException"
    )


def pieces(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Pieces of at most `PIECE_CHARACTERS` whose tokens, one after another, are those of the text.

    Raises `BadRecord` when there is no place to cut.
    """
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end, following = _cut(tokenizer, text, start + PIECE_CHARACTERS)
        yield text[start:end]
        start = following
    yield text[start:]


def _cut(tokenizer: Tokenizer, text: str, limit: int) -> tuple[int, int]:
    """(end of a piece, start of the next) at or a little before `limit`.

    They differ by one where the tokenizer puts a space before every text, as SentencePiece does: that space then stands
    for the one that is left out. Places before white space are tried first; with the usual patterns no token crosses
    them.
    """
    nearest = range(limit, max(limit - CUT_SEARCH_CHARACTERS, 1), -1)
    spaces = [place for place in nearest if text[place].isspace() and not text[place - 1].isspace()]
    for place in (*spaces, *nearest):
        left = text[max(0, place - CUT_CONTEXT_CHARACTERS) : place]
        right = text[place : place + CUT_CONTEXT_CHARACTERS]
        whole, first, second, unspaced = (
            ids.tolist() for ids in tokenizer.encode_arrays([left + right, left, right, right[1:]])
        )
        if first + second == whole:
            return place, place
        if right[0] == " " and first + unspaced == whole:
            return place, place + 1
    raise BadRecord("not_encodable", f"no place to cut its {len(text)} characters near character {limit}")


@functools.cache
def _loaded_tokenizer(name: str) -> Tokenizer:
    """One tokenizer a process: workers get its name, since loading is dearer than encoding a batch."""
    return load_tokenizer(name)
