"""The token files against the format's description, byte by byte, and against damaged files."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from megatron_tf.data.indexed import IndexedDataset, IndexedWriter
from megatron_tf.errors import DataError, UserError

DOCUMENTS = [[5, 6, 7], [1], [2, 3], [64999, 0]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int) -> None:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)


def handmade(prefix: Path, sequences: list[list[int]], document_index: list[int], code: int, letter: str) -> None:
    """The same format from its description, with struct alone: as other programs write it."""
    payload, sizes, pointers = b"", [], []
    for sequence in sequences:
        sizes.append(len(sequence))
        pointers.append(len(payload))
        payload += struct.pack(f"<{len(sequence)}{letter}", *sequence)
    index = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    index += struct.pack("<Q", len(sizes)) + struct.pack("<Q", len(document_index))
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(pointers)}q", *pointers)
    index += struct.pack(f"<{len(document_index)}q", *document_index)
    Path(f"{prefix}.bin").write_bytes(payload)
    Path(f"{prefix}.idx").write_bytes(index)


@pytest.mark.parametrize(("vocab_size", "code", "letter"), [(65499, 8, "H"), (65500, 4, "i")])
def test_written_bytes_are_those_of_the_format(tmp_path, vocab_size, code, letter):
    write(tmp_path / "ours", DOCUMENTS, vocab_size)
    handmade(tmp_path / "theirs", DOCUMENTS, [0, 1, 2, 3, 4], code, letter)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.fixture(scope="module")
def megatron():
    """megatron-core's own module, where it is installed."""
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def build(megatron, prefix: Path, documents: list[list[list[int]]], dtype: type) -> None:
    """Documents of sequences, written by megatron-core."""
    torch = pytest.importorskip("torch")
    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        flat = [token for sequence in sequences for token in sequence]
        builder.add_document(torch.tensor(flat), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_equal_to_megatron_core(tmp_path, megatron, vocab_size, dtype):
    assert megatron.DType.optimal_dtype(vocab_size) == dtype
    write(tmp_path / "ours", DOCUMENTS, vocab_size)
    build(megatron, tmp_path / "theirs", [[document] for document in DOCUMENTS], dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [read[number].tolist() for number in range(len(read))] == DOCUMENTS
    assert read.document_indices.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_reads_megatron_core_with_several_sequences_a_document(tmp_path, megatron, dtype):
    build(megatron, tmp_path / "x", [[[1, 2], [3]], [[4, 5, 6]], [[7], [8], [9]]], dtype)
    dataset = IndexedDataset(tmp_path / "x")
    assert (dataset.num_sequences, dataset.num_documents) == (6, 3)
    assert dataset.tokens(0, 9).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert dataset.document_offsets.tolist() == [0, 3, 6, 9]


def test_documents_added_together_are_as_if_one_by_one(tmp_path):
    write(tmp_path / "one", DOCUMENTS, 65499)
    with IndexedWriter(tmp_path / "all", 65499) as writer:
        flat = np.array([token for document in DOCUMENTS for token in document], dtype=np.int32)
        writer.add_documents(flat[:4], np.array([3, 1]))
        writer.add_documents(flat[:0], np.array([], dtype=np.int64))
        writer.add_documents(flat[4:], np.array([2, 2]))
        assert (writer.num_documents, writer.num_tokens, writer.max_token_id) == (4, 8, 64999)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"all{suffix}").read_bytes() == (tmp_path / f"one{suffix}").read_bytes()


@pytest.mark.parametrize("token", [-1, 10])
def test_the_document_of_an_id_outside_the_vocabulary_is_named(tmp_path, token):
    with (
        pytest.raises(DataError, match=rf"document 2 has token id {token}, "),
        IndexedWriter(tmp_path / "x", 10) as writer,
    ):
        writer.add_documents(np.array([1, 2, 3, 4, token, 5]), np.array([3, 1, 2]))


@pytest.mark.parametrize("vocab_size", [65000, 100_000])
def test_round_trip(tmp_path, vocab_size):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, vocab_size, size).tolist() for size in generator.integers(0, 50, 40)]
    write(tmp_path / "x", documents, vocab_size)
    dataset = IndexedDataset(tmp_path / "x")
    flat = [token for document in documents for token in document]
    assert (dataset.num_documents, dataset.num_tokens) == (40, len(flat))
    assert dataset.tokens(0, dataset.num_tokens).tolist() == flat
    assert dataset.tokens(7, 19).tolist() == flat[7:19] and dataset.tokens(7, 19).dtype == np.int64
    assert dataset.document_offsets.tolist() == [0, *np.cumsum([len(document) for document in documents]).tolist()]


@pytest.mark.parametrize(("code", "letter"), [(1, "B"), (2, "b"), (3, "h"), (4, "i"), (5, "q"), (8, "H")])
def test_reads_other_writers_several_sequences_a_document(tmp_path, code, letter):
    handmade(tmp_path / "x", [[1, 2], [3], [4, 5, 6], [7]], [0, 2, 2, 4], code, letter)
    dataset = IndexedDataset(tmp_path / "x")
    assert (dataset.num_sequences, dataset.num_documents, dataset.num_tokens) == (4, 3, 7)
    assert dataset.tokens(1, 6).tolist() == [2, 3, 4, 5, 6]
    assert dataset.document_offsets.tolist() == [0, 3, 3, 7]


def test_no_documents(tmp_path):
    write(tmp_path / "x", [], 10)
    dataset = IndexedDataset(tmp_path / "x")
    assert (dataset.num_documents, dataset.num_tokens, dataset.document_offsets.tolist()) == (0, 0, [0])


def test_interrupted_writer_leaves_the_old_files(tmp_path):
    write(tmp_path / "x", [[1, 2]], 10)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError), IndexedWriter(tmp_path / "x", 10) as writer:
        writer.add_document([3] * 100_000)
        raise ZeroDivisionError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without space")
@pytest.mark.parametrize("num_documents", [1, 100_000])
def test_full_disk_leaves_nothing(tmp_path, num_documents):
    """It fails on closing, or while writing; then the buffer is still full and closing fails a second time."""
    with pytest.raises(OSError, match="No space left"), IndexedWriter(tmp_path / "x", 10) as writer:
        writer._bin.close()
        writer._bin = open("/dev/full", "wb")  # noqa: SIM115 - the writer closes it
        for _ in range(num_documents):
            writer.add_document([3] * 10)
    assert list(tmp_path.iterdir()) == []


def test_killed_between_the_renames_there_is_no_dataset(tmp_path, monkeypatch):
    write(tmp_path / "x", [[1, 2]], 10)
    published = []

    def publish_once(temporary: Path, final: Path) -> None:
        if published:
            raise KeyboardInterrupt
        published.append(final)
        temporary.rename(final)

    monkeypatch.setattr("megatron_tf.data.indexed.publish", publish_once)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", [[3, 4]], 10)
    with pytest.raises(DataError, match=r"x\.idx: no such file"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("token", [-1, 10])
def test_writer_refuses_id_outside_vocabulary(tmp_path, token):
    with pytest.raises(DataError, match=rf"document 1 has token id {token}, .*vocabulary of 10"):
        write(tmp_path / "x", [[1], [2, token]], 10)
    assert list(tmp_path.iterdir()) == []


def replace_bytes(path: Path, start: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + len(value)] = value
    path.write_bytes(content)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


# 4 documents: .idx has 34 + 4*12 + 5*8 = 122 bytes, .bin 8 tokens of 2 bytes.
DAMAGES = {
    "no bin": (lambda x: Path(f"{x}.bin").unlink(), r"x\.bin: no such file.*preprocess_data"),
    "no idx": (lambda x: Path(f"{x}.idx").unlink(), r"x\.idx: no such file.*preprocess_data"),
    "empty idx": (lambda x: truncate(Path(f"{x}.idx"), 0), r"x\.idx: begins with b''.*not a Megatron index"),
    "foreign idx": (lambda x: replace_bytes(Path(f"{x}.idx"), 0, b"TNTIDX"), r"x\.idx: begins with b'TNTIDX"),
    "short header": (lambda x: truncate(Path(f"{x}.idx"), 20), r"x\.idx: has 20 bytes, its header alone 34"),
    "version": (lambda x: replace_bytes(Path(f"{x}.idx"), 9, b"\x02"), r"x\.idx: has format version 2, .*version 1"),
    "float": (lambda x: replace_bytes(Path(f"{x}.idx"), 17, b"\x06"), r"x\.idx: has token type 6, known are \[1, 2"),
    "short idx": (lambda x: truncate(Path(f"{x}.idx"), 121), r"x\.idx: has 121 bytes, but 4 .* 5 .* need 122"),
    "huge count": (lambda x: replace_bytes(Path(f"{x}.idx"), 18, b"\xff" * 8), r"x\.idx: has 122 bytes, but 184467440"),
    "document index": (
        lambda x: replace_bytes(Path(f"{x}.idx"), 114, b"\x03"),
        r"x\.idx: the document index runs from 0 to 3, but there are 4",
    ),
    "short bin": (lambda x: truncate(Path(f"{x}.bin"), 15), r"x\.bin: has 15 bytes, but x\.idx describes 16"),
    "long bin": (lambda x: Path(f"{x}.bin").write_bytes(b"0" * 18), r"x\.bin: has 18 bytes, but x\.idx describes 16"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named_on_opening(tmp_path, damage):
    write(tmp_path / "x", DOCUMENTS, 65000)
    inflict, message = DAMAGES[damage]
    inflict(tmp_path / "x")
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "x")


def index_of(prefix: Path, sizes: list[int], pointers: list[int], document_index: list[int]) -> IndexedDataset:
    """An index over 8 tokens of 2 bytes."""
    handmade(prefix, [[1, 2, 3, 4, 5, 6, 7, 8]], [0, 1], 8, "H")
    Path(f"{prefix}.idx").write_bytes(
        struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(sizes), len(document_index))
        + np.array(sizes, "<i4").tobytes() + np.array(pointers, "<i8").tobytes()
        + np.array(document_index, "<i8").tobytes()
    )  # fmt: skip
    return IndexedDataset(prefix)


OUT_OF_ORDER = {
    "a document left out": (
        [2, 4],
        [0, 8],
        [0, 1, 2],
        "sequence 1 begins at byte 8, .* at byte 4: 4 bytes of x.bin be",
    ),
    "the first left out": ([6], [4], [0, 1], "sequence 0 begins at byte 4, .* ends at byte 0: 4 bytes"),
    "one twice": (
        [2, 2, 6],
        [0, 0, 4],
        [0, 1, 2, 3],
        "sequence 1 begins at byte 0, .* at byte 4: some tokens are in two",
    ),
    "another order": ([2, 4, 2], [4, 0, 12], [0, 1, 2, 3], "sequence 0 begins at byte 4"),
    "a wrong size": ([3, 6], [0, 4], [0, 1, 2], "sequence 1 begins at byte 4, .* at byte 6: some tokens"),
    "no size": ([2, -2, 8], [0, 4, 0], [0, 1, 2, 3], "sequence 1 has -2 tokens. The file is damaged"),
    "a far place": ([2, 2, 4], [0, 2**62, 8], [0, 1, 2, 3], f"sequence 1 begins at byte {2**62}"),
    "a falling document": ([2, 4, 2], [0, 4, 12], [0, 2, 1, 3], "document index has 2 at entry 1 and 1 after it"),
    "a document behind the end": (
        [2, 6],
        [0, 4],
        [0, 5, 2],
        "document index has (0 at entry 0 and 5|5 at entry 1 and 2) after it",
    ),
    "a document before the beginning": ([2, 6], [0, 4], [0, -1, 2], "document index has 0 at entry 0 and -1 after it"),
}


@pytest.mark.parametrize("entries_at_once", [1, 2, 1 << 20])
@pytest.mark.parametrize("case", OUT_OF_ORDER)
def test_an_index_that_is_not_all_of_the_tokens_in_order(tmp_path, monkeypatch, case, entries_at_once):
    """As other programs write it for a choice of documents; nothing that uses its entries gets behind the tokens."""
    monkeypatch.setattr("megatron_tf.data.indexed.CHECKED_AT_ONCE", entries_at_once)
    *entries, message = OUT_OF_ORDER[case]
    dataset = index_of(tmp_path / "x", *entries)
    for use in (dataset.check_index, lambda: dataset.document_offsets):
        with pytest.raises(DataError, match=rf"x\.idx: .*{message}"):
            use()
    with suppress(DataError):
        dataset.ends_of_documents(9)


@pytest.mark.parametrize("entries_at_once", [1, 2, 1 << 20])
def test_an_index_in_order(tmp_path, monkeypatch, entries_at_once):
    monkeypatch.setattr("megatron_tf.data.indexed.CHECKED_AT_ONCE", entries_at_once)
    index_of(tmp_path / "x", [2, 0, 5, 1], [0, 4, 4, 14], [0, 0, 2, 2, 4]).check_index()
    write(tmp_path / "y", [], 10)
    IndexedDataset(tmp_path / "y").check_index()


def test_an_index_of_multimodal_data(tmp_path):
    write(tmp_path / "x", DOCUMENTS, 65000)
    Path(f"{tmp_path}/x.idx").write_bytes(Path(f"{tmp_path}/x.idx").read_bytes() + b"\0" * 4)
    with pytest.raises(DataError, match=r"x\.idx: is an index of multimodal data"):
        IndexedDataset(tmp_path / "x")


def test_half_a_token(tmp_path):
    handmade(tmp_path / "x", [[1, 2]], [0, 1], 8, "H")
    replace_bytes(tmp_path / "x.idx", 38, b"\x01")  # the first byte of the sequence
    (tmp_path / "x.bin").write_bytes(b"12345")
    with pytest.raises(DataError, match=r"x\.bin: has 5 bytes, which are no whole number of tokens of 2 bytes"):
        IndexedDataset(tmp_path / "x")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_files_that_are_none(tmp_path, suffix):
    write(tmp_path / "x", DOCUMENTS, 65000)
    Path(f"{tmp_path}/x{suffix}").unlink()
    os.mkfifo(f"{tmp_path}/x{suffix}")
    with pytest.raises(DataError, match=rf"x\{suffix}: is a folder or a device, not a file"):
        IndexedDataset(tmp_path / "x")
    Path(f"{tmp_path}/x{suffix}").unlink()
    Path(f"{tmp_path}/x{suffix}").symlink_to("gone")
    with pytest.raises(DataError, match=rf"x\{suffix}: is a link to gone, and nothing is there"):
        IndexedDataset(tmp_path / "x")


def test_suffix_given_instead_of_prefix(tmp_path):
    write(tmp_path / "x", DOCUMENTS, 65000)
    with pytest.raises(DataError, match=r"x\.bin\.bin: no such file. Give the common prefix of the two files: .*/x$"):
        IndexedDataset(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "x.bin: File name too long. Prepare the data"),
        ("a\0b", r"a.x00b\.bin': cannot be a path"),
        ("folder", "folder.bin: is a folder or a device, not a file"),
        ("good.idx/a", "a.bin: no such file. Prepare the data"),
    ],
)
def test_prefixes_that_lead_nowhere(tmp_path, name, message):
    write(tmp_path / "good", DOCUMENTS, 65499)
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(DataError, match=message):
        IndexedDataset(f"{tmp_path}/{name}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_files_of_somebody_else(tmp_path, suffix):
    write(tmp_path / "a", DOCUMENTS, 65499)
    (tmp_path / f"a{suffix}").chmod(0)
    with pytest.raises(DataError, match=rf"a\{suffix}: Permission denied. Make it readable"):
        IndexedDataset(tmp_path / "a")


def test_outputs_in_the_way_are_refused_before_anything_is_changed(tmp_path):
    write(tmp_path / "a", DOCUMENTS, 65499)
    (tmp_path / "a.bin").unlink()
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(UserError, match="a.bin: is a folder"):
        write(tmp_path / "a", DOCUMENTS, 65499)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
