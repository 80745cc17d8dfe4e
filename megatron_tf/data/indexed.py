"""Token files in the format of Megatron-LM, GPT-NeoX and TokenFormer: `PREFIX.bin` and `PREFIX.idx`.

All numbers are little endian. With S sequences and D documents, `.idx` is

| byte          | type         | field                                                                          |
|---------------|--------------|--------------------------------------------------------------------------------|
| 0             | 9 bytes      | magic `MMIDIDX\\0\\0`                                                          |
| 9             | u64          | version, 1                                                                     |
| 17            | u8           | token type: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16                             |
| 18            | u64          | S                                                                              |
| 26            | u64          | D + 1, the entries of the document index                                       |
| 34            | i32 [S]      | tokens of each sequence                                                        |
| 34 + 4S       | i64 [S]      | first byte of each sequence in `.bin`                                          |
| 34 + 12S      | i64 [D + 1]  | document index: document j is the sequences from entry j up to entry j + 1     |

`.bin` is the tokens of all sequences, one after another, with nothing between. Types 6 and 7 are floats of a
different width in Megatron-LM and GPT-NeoX; they are never written and refused when read.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
import struct
import sys
from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np

from megatron_tf.durable import partial_path, prepare_output, publish, sync_folder
from megatron_tf.errors import DataError, broken_link, file_errors

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CHECKED_AT_ONCE = 1 << 20  # entries of the index, which bounds the memory
PROBE_BYTES = 1 << 16
U16_VOCABULARY_LIMIT = 65500  # Megatron's own limit, kept so that files are byte-identical


# Before Python 3.13 a map keeps a descriptor of its own for as long as it lives.
_MAP_OPTIONS: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def data_file(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def index_file(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


def token_type(vocab_size: int) -> tuple[int, np.dtype]:
    """(code, type) in which ids below `vocab_size` are written."""
    code = 8 if vocab_size < U16_VOCABULARY_LIMIT else 4
    return code, np.dtype(TOKEN_TYPES[code])


def pack_header(code: int, num_documents: int) -> bytes:
    """Beginning of an index of documents that are one sequence each."""
    return HEADER.pack(MAGIC, 1, code, num_documents, num_documents + 1)


def publish_pair(prefix: str | Path) -> None:
    """Give both files, complete under their temporary names, their own: `.idx` last."""
    bin_path, idx_path = data_file(prefix), index_file(prefix)
    # An old index next to the new tokens would be read as data: it goes before the tokens change.
    idx_path.unlink(missing_ok=True)
    publish(partial_path(bin_path), bin_path)
    sync_folder(bin_path.parent)  # a power cut must not keep the index's name and lose that of the tokens
    publish(partial_path(idx_path), idx_path)
    sync_folder(idx_path.parent)


@final
class IndexedWriter:
    """Writes one pair of files, each document as one sequence. Use it as a context manager.

    Both files are written under temporary names and renamed when the block ends well, `.idx` last: while there is no
    `.idx` there is no data set. When the block raises, what was written is deleted and older files stay as they were.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, code: int | None = None):
        """`vocab_size`: ids are below it; it decides between u16 and i32, unless `code` of TOKEN_TYPES does."""
        self.prefix = str(prefix)
        self.vocab_size = vocab_size
        self.num_tokens = 0
        self.max_token_id = -1  # of all documents so far; -1 before the first token
        self._type_code = token_type(vocab_size)[0] if code is None else code
        self._dtype = np.dtype(TOKEN_TYPES[self._type_code])
        self._sizes = array("i")
        for path in (index_file(prefix), data_file(prefix)):
            prepare_output(path)
        self._bin = open(partial_path(data_file(prefix)), "wb", buffering=1 << 20)  # noqa: SIM115 - closed by close()

    @property
    def num_documents(self) -> int:
        return len(self._sizes)

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document's token ids. Raises `DataError` for an id outside [0, vocab_size)."""
        tokens = np.asarray(ids, dtype=np.int64)
        self.add_documents(tokens, np.array([tokens.size]))

    def add_documents(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents whose ids [tokens] stand one after another, `lengths` [documents] of them each."""
        assert ids.size == lengths.sum(), (ids.size, lengths.sum())
        if ids.size:
            smallest, largest = int(ids.min()), int(ids.max())
            if smallest < 0 or largest >= self.vocab_size:
                place = int(np.flatnonzero((ids < 0) | (ids >= self.vocab_size))[0])
                document = self.num_documents + int(np.searchsorted(np.cumsum(lengths), place, side="right"))
                raise DataError(
                    f"{self.prefix}: document {document} has token id {int(ids[place])}, "
                    f"outside the vocabulary of {self.vocab_size}. Use the tokenizer that the vocabulary size belongs "
                    "to."
                )
            self.max_token_id = max(self.max_token_id, largest)
        self._bin.write(ids.astype(self._dtype).data)
        self._sizes.extend(lengths.tolist())
        self.num_tokens += ids.size

    def close(self) -> None:
        """Write the index and give both files their names."""
        self._bin.close()
        sizes = np.array(self._sizes, dtype="<i4")
        pointers = np.zeros(sizes.size, dtype="<i8")
        np.cumsum(sizes[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= self._dtype.itemsize
        with open(partial_path(index_file(self.prefix)), "wb") as file:
            file.write(pack_header(self._type_code, sizes.size))
            file.write(sizes.tobytes())
            file.write(pointers.tobytes())
            file.write(np.arange(sizes.size + 1, dtype="<i8").tobytes())
        publish_pair(self.prefix)

    def discard(self) -> None:
        """Delete what was written so far."""
        # On a full disk closing fails once more, on what is still buffered; the file has to go all the same.
        with suppress(OSError):
            self._bin.close()
        for path in (data_file(self.prefix), index_file(self.prefix)):
            partial_path(path).unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
            return
        try:
            self.close()
        except BaseException:
            self.discard()
            raise


class IndexedDataset:
    """A pair of files, memory-mapped: opening it reads a few dozen bytes, whatever its size.

    Raises `DataError` on opening when a file is missing, unreadable, truncated, of another format, or when the two do
    not belong together. The sequences must lie in `.bin` in order and without gaps, because tokens are read from end to
    end. `check_index` checks that for all entries; methods that use some entries check those.
    An open data set holds one file descriptor, that of `.bin`, and none from Python 3.13 on: the index is opened for
    each use.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        bin_bytes = _size_of(data_file(prefix), self.prefix)
        idx_bytes = _size_of(index_file(prefix), self.prefix)
        dtype, self.num_sequences, entries = _read_header(index_file(prefix), idx_bytes)
        self.num_documents = entries - 1
        self.dtype = dtype  # of the tokens in the file
        self._check_ends(bin_bytes, dtype)
        self.num_tokens = bin_bytes // dtype.itemsize
        self._tokens = _mapped(data_file(prefix), dtype) if bin_bytes else np.empty(0, dtype)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of all documents one after another, as int64 [stop - start], copied."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        return self._tokens[start:stop].astype(np.int64)

    def content(self, start: int, stop: int) -> bytes:
        """Tokens [start, stop) as they stand in the file."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        return self._tokens[start:stop].tobytes()

    def read_into(self, out: np.ndarray, start: int) -> None:
        """Fill the int64 [n] `out` with tokens [start, start + n)."""
        assert 0 <= start <= self.num_tokens - out.size, (start, out.size, self.num_tokens)
        out[:] = self._tokens[start : start + out.size]

    def ends_of_documents(self, most: int) -> np.ndarray:
        """The last token of each of the first `most` documents, without empty ones; int64. Costs O(most)."""
        _, pointers, document_index = self._index()
        self._check_document_index(document_index[: most + 1])
        sequences = document_index[1 : most + 1].astype(np.int64)
        size = self.num_tokens * self.dtype.itemsize
        ends = np.full(sequences.shape, size, dtype=np.int64)
        inside = sequences < self.num_sequences
        ends[inside] = pointers[sequences[inside]]
        if (ends < 0).any() or (ends > size).any() or (ends % self.dtype.itemsize).any():
            # raises with the place of the fault
            self.check_index()
        stops = np.unique(ends // self.dtype.itemsize)
        return self._tokens[stops[stops > 0] - 1].astype(np.int64)

    def ends_digest(self) -> str:
        """SHA-256 of the first and last PROBE_BYTES of the tokens, hexadecimal: tells apart files of one size."""
        path = data_file(self.prefix)
        with file_errors(DataError, path, "Make it readable or correct the path."), open(path, "rb") as file:
            ends = file.read(PROBE_BYTES)
            file.seek(max(0, file.seek(0, os.SEEK_END) - PROBE_BYTES))
            return hashlib.sha256(ends + file.read(PROBE_BYTES)).hexdigest()

    @cached_property
    def document_offsets(self) -> np.ndarray:
        """First token of each document, and the number of tokens at the end: int64 [num_documents + 1].

        Costs a pass over the index, so it is built only when asked for.
        """
        self.check_index()
        _, pointers, document_index = self._index()
        starts = np.append(pointers // self._tokens.dtype.itemsize, self.num_tokens)
        return starts[document_index]

    def check_index(self) -> None:
        """Raise `DataError` unless all of `.bin` is in the sequences, once and in order, and these in the documents.

        Costs a pass over the index. Files of this module always pass; other programs also write an index of only some
        documents over the tokens of all.
        """
        sizes, pointers, document_index = self._index()
        end = 0  # byte, of the sequence before
        for start in range(0, self.num_sequences, CHECKED_AT_ONCE):
            counts = sizes[start : start + CHECKED_AT_ONCE].astype(np.int64)
            ends = end + np.cumsum(counts * self.dtype.itemsize)
            wrong = np.flatnonzero(
                (counts < 0) | (pointers[start : start + CHECKED_AT_ONCE] != ends - counts * self.dtype.itemsize)
            )
            if wrong.size:
                place = int(wrong[0])
                before = int(ends[place - 1]) if place else end
                raise self._out_of_order(start + place, int(counts[place]), int(pointers[start + place]), before)
            end = int(ends[-1])
        for start in range(0, self.num_documents, CHECKED_AT_ONCE):
            self._check_document_index(document_index[start : start + CHECKED_AT_ONCE + 1], start)

    def _out_of_order(self, sequence: int, tokens: int, first: int, expected: int) -> DataError:
        """`first`: its first byte as the index says; `expected`: the byte after the sequence before it."""
        path, tokens_path = index_file(self.prefix), data_file(self.prefix)
        if tokens < 0:
            return DataError(
                f"{path}: sequence {sequence} has {tokens} tokens. The file is damaged: copy it again or prepare the "
                f"data again."
            )
        if first > expected:
            problem = f"{first - expected} bytes of {tokens_path.name} before it are in no document"
        else:
            problem = "some tokens are in two documents, or these are in another order"
        return DataError(
            f"{path}: sequence {sequence} begins at byte {first}, but the one before it ends at byte {expected}: "
            f"{problem}. {tokens_path.name} is read from end to end, whatever documents the index leaves out: write "
            f"those that it lists into a pair of files of their own, or prepare them again."
        )

    def _check_document_index(self, entries: np.ndarray, first: int = 0) -> None:
        """Raise `DataError` unless `entries` of it, from `first` on, rise within the sequences."""
        falls = np.flatnonzero(entries[1:] < entries[:-1])
        if falls.size or entries[0] < 0 or entries[-1] > self.num_sequences:
            place = int(falls[0]) if falls.size else 0 if entries[0] < 0 else entries.size - 2
            raise DataError(
                f"{index_file(self.prefix)}: the document index has {int(entries[place])} at entry {first + place} and "
                f"{int(entries[place + 1])} after it, but must rise from 0 to {self.num_sequences}. The file is "
                f"damaged: copy it again or prepare the data again."
            )

    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of each sequence, its first byte, and the document index, mapped for as long as they are held."""
        index = _mapped(index_file(self.prefix), np.dtype(np.uint8))
        sizes_end = HEADER.size + 4 * self.num_sequences
        pointers_end = sizes_end + 8 * self.num_sequences
        return (
            index[HEADER.size : sizes_end].view("<i4"),
            index[sizes_end:pointers_end].view("<i8"),
            index[pointers_end:].view("<i8"),
        )

    def _check_ends(self, bin_bytes: int, dtype: np.dtype) -> None:
        """DataError unless the first and last entries of the index fit the number of sequences and `.bin`."""
        path, count = index_file(self.prefix), self.num_sequences
        sizes, pointers, document_index = self._index()
        first, last = int(document_index[0]), int(document_index[-1])
        if first != 0 or last != count:
            raise DataError(
                f"{path}: the document index runs from {first} to {last}, but there are {count} sequences. "
                f"The file is damaged: prepare the data again."
            )
        described = int(pointers[-1]) + int(sizes[-1]) * dtype.itemsize if count else 0
        if described != bin_bytes:
            raise DataError(
                f"{data_file(self.prefix)}: has {bin_bytes} bytes, but {path.name} describes {described}. One of the "
                f"two is truncated or belongs to other data: copy both again or prepare the data again."
            )
        if bin_bytes % dtype.itemsize:
            raise DataError(
                f"{data_file(self.prefix)}: has {bin_bytes} bytes, which are no whole number of tokens of "
                f"{dtype.itemsize} bytes. The file is truncated or belongs to another index: copy both again or "
                "prepare the data again."
            )


def _size_of(path: Path, prefix: str) -> int:
    hint = "Prepare the data with tools/preprocess_data.py or correct the path."
    if prefix.endswith((".bin", ".idx")):
        hint = f"Give the common prefix of the two files: {prefix[:-4]}"
    with file_errors(DataError, path, hint):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(f"{path}: {broken_link(path) or 'no such file'}. {hint}") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: is a folder or a device, not a file. {hint}")
    return status.st_size


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """The content of a file that is not empty, read as it is asked for."""
    with file_errors(DataError, path, "Make it readable or correct the path."), open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, **_MAP_OPTIONS), dtype=dtype)


def _read_header(path: Path, file_bytes: int) -> tuple[np.dtype, int, int]:
    """Token type, number of sequences, and entries of the document index of `path`."""
    with file_errors(DataError, path, "Make it readable or correct the path."), open(path, "rb") as file:
        head = file.read(HEADER.size)
    if not head.startswith(MAGIC):
        raise DataError(
            f"{path}: begins with {head[: len(MAGIC)]!r}, an index begins with {MAGIC!r}. "
            f"It is not a Megatron index: prepare the data with tools/preprocess_data.py."
        )
    if len(head) < HEADER.size:
        raise DataError(f"{path}: has {file_bytes} bytes, its header alone {HEADER.size}. Prepare the data again.")
    _, version, code, sequences, entries = HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{path}: has format version {version}, only version 1 is known. Prepare the data again.")
    if code not in TOKEN_TYPES:
        raise DataError(
            f"{path}: has token type {code}, known are {sorted(TOKEN_TYPES)}. Prepare the data again as integers."
        )
    expected = HEADER.size + 12 * sequences + 8 * entries
    if sequences and file_bytes == expected + sequences:
        raise DataError(f"{path}: is an index of multimodal data, which are not read here. Prepare the text alone.")
    if entries < 1 or file_bytes != expected:
        raise DataError(
            f"{path}: has {file_bytes} bytes, but {sequences} sequences and {entries} document entries need "
            f"{expected}. The file is truncated or damaged: copy it again or prepare the data again."
        )
    return np.dtype(TOKEN_TYPES[code]), sequences, entries
