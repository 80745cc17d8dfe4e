"""Merged files are those that one writer would have written, however the system copies."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from megatron_tf.data.indexed import IndexedDataset, IndexedWriter, publish_pair
from megatron_tf.data.preparation import merge
from megatron_tf.data.preparation.merge import merge_pairs
from megatron_tf.errors import DataError

PARTS = [[[5, 6, 7], [1]], [], [[2, 3]], [[9, 0], [4, 4, 4, 4, 4]]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int) -> Path:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


def no_copy(*arguments):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def half_then_none(source: int, out: int, size: int, asked=[]) -> int:  # noqa: B006 - counts its calls
    """A file system that copies a little, then says 0 instead of refusing."""
    asked.append(size)
    return os.write(out, os.read(source, size // 2)) if len(asked) == 1 else 0


@pytest.mark.parametrize("copy", ["system", None, no_copy, half_then_none])
@pytest.mark.parametrize("vocab_size", [100, 100_000])
def test_merged_is_as_written_at_once(tmp_path, monkeypatch, vocab_size, copy):
    if copy != "system":
        monkeypatch.setattr(os, "copy_file_range", copy, raising=False)
    monkeypatch.setattr(merge, "ENTRIES", 2)
    prefixes = [write(tmp_path / str(n), documents, vocab_size) for n, documents in enumerate(PARTS)]
    merge_pairs(prefixes, str(tmp_path / "x"), vocab_size)
    publish_pair(tmp_path / "x")
    write(tmp_path / "y", [document for documents in PARTS for document in documents], vocab_size)
    assert contents(tmp_path / "x") == contents(tmp_path / "y")
    assert IndexedDataset(tmp_path / "x").document_offsets.tolist() == [0, 3, 4, 6, 8, 13]


@pytest.mark.parametrize("links", [True, False])
def test_a_single_part_is_not_copied(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_copy)
    part = write(tmp_path / "0", PARTS[0], 100)
    merge_pairs([part], str(tmp_path / "x"), 100)
    publish_pair(tmp_path / "x")
    assert contents(tmp_path / "x") == contents(part)
    assert os.path.samefile(tmp_path / "x.bin", tmp_path / "0.bin") == links


def test_the_tokens_pass_through_the_system_once(tmp_path, monkeypatch):
    copied = []
    original = getattr(os, "copy_file_range", None)
    if original is None:
        pytest.skip("needs copy_file_range")

    def count(source: int, out: int, size: int) -> int:
        copied.append(original(source, out, size))
        return copied[-1]

    monkeypatch.setattr(os, "copy_file_range", count)
    prefixes = [write(tmp_path / str(n), [[n] * 5000] * 20, 100) for n in range(3)]
    merge_pairs(prefixes, str(tmp_path / "x"), 100)
    if sum(copied) == 0:
        pytest.skip("this file system does not copy by itself")
    assert sum(copied) == 3 * 20 * 5000 * 2


def test_a_part_of_another_kind_or_damaged_is_refused(tmp_path):
    parts = [write(tmp_path / "0", PARTS[0], 100), write(tmp_path / "1", PARTS[0], 100_000)]
    with pytest.raises(DataError, match=r"1\.idx: is no part of this preparation"):
        merge_pairs(parts, str(tmp_path / "x"), 100)
    (tmp_path / "0.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.bin: has 0 bytes"):
        merge_pairs(parts[:1], str(tmp_path / "x"), 100)


def test_a_full_disk_is_not_taken_for_a_file_system_that_cannot_copy(tmp_path, monkeypatch):
    def no_space(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", no_space, raising=False)
    prefixes = [write(tmp_path / str(n), PARTS[0], 100) for n in range(2)]
    with pytest.raises(OSError, match="No space left"):
        merge_pairs(prefixes, str(tmp_path / "x"), 100)


def test_more_parts_than_files_may_be_open(tmp_path):
    import resource

    parts = [write(tmp_path / str(n), [[n]], 1000) for n in range(300)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
    try:
        merge_pairs(parts, str(tmp_path / "x"), 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    publish_pair(tmp_path / "x")
    assert IndexedDataset(tmp_path / "x").tokens(0, 300).tolist() == np.arange(300).tolist()
