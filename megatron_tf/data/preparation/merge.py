"""Merges the token files of many parts into one pair. The tokens are copied once, by the system where it can."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_tf.data.indexed import (
    HEADER,
    TOKEN_TYPES,
    IndexedDataset,
    data_file,
    index_file,
    pack_header,
    token_type,
)
from megatron_tf.durable import partial_path
from megatron_tf.errors import DataError

COPY_BYTES = 1 << 30  # asked of the system at once
ENTRIES = 1 << 20  # of the index, in memory at once
# Errors of file systems that cannot copy by themselves, or not between these two files.
NO_COPY = frozenset(
    {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM, errno.ETXTBSY}
)


def merge_pairs(prefixes: Sequence[Path], output: str, vocab_size: int, code: int | None = None) -> None:
    """Write the documents of all `prefixes`, one sequence each, under the temporary names of OUTPUT.bin and .idx.

    `publish_pair` then gives the files their final names. `vocab_size`, `code`: as given to the `IndexedWriter` of each
    prefix. A single pair is linked, not copied. The inputs stay. Raises `DataError` for a damaged input, and OSError.
    """
    bin_path, idx_path = partial_path(data_file(output)), partial_path(index_file(output))
    for path in (bin_path, idx_path):
        path.unlink(missing_ok=True)
    code = token_type(vocab_size)[0] if code is None else code
    sizes = [_size(prefix, code) for prefix in prefixes]
    if len(prefixes) == 1:
        _link_or_copy(data_file(prefixes[0]), bin_path)
        _link_or_copy(index_file(prefixes[0]), idx_path)
        return
    with open(bin_path, "wb") as out:
        for prefix in prefixes:
            with open(data_file(prefix), "rb") as source:
                _append(source, out, os.fstat(source.fileno()).st_size)
    with open(idx_path, "wb") as out:
        _write_index(prefixes, sizes, code, out)


def _size(prefix: Path, code: int) -> tuple[int, int]:
    """(documents, tokens) of a part, which is closed again: thousands would be too many open files. DataError."""
    dataset = IndexedDataset(prefix)
    if dataset.dtype != np.dtype(TOKEN_TYPES[code]) or dataset.num_documents != dataset.num_sequences:
        raise DataError(f"{prefix}.idx: is no part of this preparation. Delete it and run again.")
    return dataset.num_documents, dataset.num_tokens


def _write_index(prefixes: Sequence[Path], sizes: Sequence[tuple[int, int]], code: int, out: BinaryIO) -> None:
    dtype = np.dtype(TOKEN_TYPES[code])
    total = sum(documents for documents, _ in sizes)
    out.write(pack_header(code, total))
    for prefix, (documents, _) in zip(prefixes, sizes, strict=True):
        with open(index_file(prefix), "rb") as source:
            source.seek(HEADER.size)
            _copy_bytes(source, out, 4 * documents)
    first_byte = 0
    for prefix, (documents, tokens) in zip(prefixes, sizes, strict=True):
        with open(index_file(prefix), "rb") as source:
            source.seek(HEADER.size + 4 * documents)
            for start in range(0, documents, ENTRIES):
                pointers = np.frombuffer(source.read(8 * min(ENTRIES, documents - start)), dtype="<i8")
                out.write((pointers + first_byte).astype("<i8").tobytes())
        first_byte += tokens * dtype.itemsize
    for start in range(0, total + 1, ENTRIES):
        out.write(np.arange(start, min(start + ENTRIES, total + 1), dtype="<i8").tobytes())


def _append(source: BinaryIO, out: BinaryIO, size: int) -> None:
    """All `size` bytes of `source` to the end of `out`, without passing through this process if the system can."""
    left = size
    copy = getattr(os, "copy_file_range", None)  # Linux
    while left and copy is not None:
        try:
            copied = copy(source.fileno(), out.fileno(), min(left, COPY_BYTES))
        except OSError as error:
            if error.errno not in NO_COPY:
                raise
            break
        if copied == 0:  # some file systems return 0 instead of an error
            break
        left -= copied
    if left:
        source.seek(size - left)
        out.seek(0, os.SEEK_END)
        _copy_bytes(source, out, left)
        out.flush()


def _copy_bytes(source: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        chunk = source.read(min(size, 1 << 22))
        if not chunk:
            raise DataError(f"{source.name}: was shortened while it was read. Prepare the data again.")
        out.write(chunk)
        size -= len(chunk)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links
        shutil.copyfile(source, target)
