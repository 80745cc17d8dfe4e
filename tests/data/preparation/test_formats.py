"""Every input format gives the same texts, and damage of any kind is a bad record, never an end without a word."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tf.data.preparation import compression, formats
from megatron_tf.data.preparation.inputs import expand_inputs
from megatron_tf.data.preparation.parquet import check_columns
from megatron_tf.data.preparation.record_types import RawRecord, ReadLimits
from megatron_tf.data.preparation.records import parse_record, read_records, read_texts
from megatron_tf.errors import DataError

TEXTS = ["first", "second with ümlaut\u2028and\nlines", "x" * 700_000, "last"]


def zstandard_frame(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(content)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".zst": zstandard_frame,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def jsonl(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def tar(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def texts_of(path: Path, **limits) -> list[str]:
    return [parse_record(record, "text") for record in read_records([path], ReadLimits(**limits))]


def problems_of(path: Path, **limits) -> list[tuple[str, int, str]]:
    """(kind, line, reason) of the bad records of a file."""
    records = read_records([path], ReadLimits(**limits))
    return [(record.problem[0], record.line, record.problem[1]) for record in records if record.problem]


@pytest.mark.parametrize("final_newline", [True, False])
@pytest.mark.parametrize("read_bytes", [7, 1 << 18])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_lines(tmp_path, monkeypatch, suffix, read_bytes, final_newline):
    monkeypatch.setattr(formats, "READ_BYTES", read_bytes)
    content = jsonl(TEXTS) if final_newline else jsonl(TEXTS)[:-1]
    middle = len(content) // 2
    parts = [COMPRESS[suffix](part) for part in (content[:middle], b"", content[middle:])]  # several frames
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"".join(parts))
    assert list(read_texts(expand_inputs([str(path)]), "text")) == TEXTS
    sizes: list[int] = []
    assert [record.line for record in read_records([path], on_read=sizes.append)] == [1, 2, 3, 4]
    assert sum(sizes) == path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
def test_whole_files(tmp_path, suffix):
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt{suffix}").write_bytes(COMPRESS[suffix](text.encode()))
    assert list(read_texts(expand_inputs([f"{tmp_path}/?.txt{suffix}"]), "text")) == TEXTS


@pytest.mark.parametrize(
    "name", ["a.tar", "a.tar.xz", "a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.zst", "urlsf_subset00-1_data.xz"]
)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_archives_of_texts(tmp_path, name, form):
    content = tar({f"folder/{number}{'n' * 60}.txt": text.encode() for number, text in enumerate(TEXTS)}, form)
    suffix = ".gz" if name.endswith("gz") else Path(name).suffix.replace(".tar", "")
    (tmp_path / name).write_bytes(COMPRESS[suffix](content))
    assert texts_of(tmp_path / name) == TEXTS
    assert next(iter(read_records([tmp_path / name]))).file == f"{tmp_path}/{name}:folder/0{'n' * 60}.txt"


def test_open_web_text_an_archive_of_compressed_archives(tmp_path):
    subsets = {
        f"openwebtext/urlsf_subset00-{number}_data.xz": lzma.compress(
            tar({f"{number}-{place}.txt": text.encode() for place, text in enumerate(TEXTS[number : number + 2])})
        )
        for number in (0, 2)
    }
    for name in ("openwebtext.tar.xz", "openwebtext.tar"):
        (tmp_path / name).write_bytes(COMPRESS[Path(name).suffix.replace(".tar", "")](tar(subsets)))
        assert texts_of(tmp_path / name) == TEXTS
    files = [record.file for record in read_records([tmp_path / "openwebtext.tar"])]
    assert files[3] == f"{tmp_path}/openwebtext.tar:openwebtext/urlsf_subset00-2_data.xz:2-1.txt"


def test_open_web_text_2_an_archive_of_compressed_lines(tmp_path):
    months = {f"2005-0{n}_data.jsonl.zst": zstandard_frame(jsonl(TEXTS[n : n + 2])) for n in (0, 2)}
    (tmp_path / "openwebtext2.jsonl.zst.tar").write_bytes(tar(months))
    assert texts_of(tmp_path / "openwebtext2.jsonl.zst.tar") == TEXTS


@pytest.mark.parametrize("suffix", [".zst", ".gz", ".xz", ".bz2"])
@pytest.mark.parametrize("damage", ["truncated", "rubbish", "flipped"])
def test_damaged_compression_is_a_bad_record_after_the_good_ones(tmp_path, suffix, damage):
    first, second = COMPRESS[suffix](jsonl(["a", "b"])), COMPRESS[suffix](jsonl(TEXTS))
    second = {
        "truncated": second[:-3],
        "rubbish": b"this is no frame at all",
        "flipped": second[:60] + bytes([second[60] ^ 255]) + second[61:],
    }[damage]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(first + second)
    (tmp_path / "b.jsonl").write_bytes(jsonl(["next file"]))
    found = list(read_records([tmp_path / f"a.jsonl{suffix}", tmp_path / "b.jsonl"]))
    assert [parse_record(record, "text") for record in (*found[:2], found[-1])] == ["a", "b", "next file"]
    bad = [record for record in found if record.problem]
    if damage != "flipped":  # where there is no checksum a flipped byte may only change the text
        assert [record.problem[0] for record in bad] == [{"truncated": "truncated", "rubbish": "broken"}[damage]]
        assert bad[0].line >= 3
    assert len(bad) <= 1


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
def test_padding_after_the_last_frame_is_no_damage(tmp_path, suffix):
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](jsonl(["a"])) + b"\0" * 1024)
    assert texts_of(tmp_path / f"a.jsonl{suffix}") == ["a"]


def two_members() -> bytes:
    return tar({"0.txt": b"a" * 600, "1.txt": b"b" * 600}, tarfile.USTAR_FORMAT)


# The folder's header, then a header and 1024 bytes for each member, then the end.
ARCHIVE_DAMAGES = {
    "in a member": (lambda content: content[:2100], ["truncated"], 1),
    "in a header": (lambda content: content[:2200], ["truncated"], 1),
    "between members": (lambda content: content[:2048], ["truncated"], 1),
    "without the end": (lambda content: content[:3584], ["truncated"], 2),
    "header overwritten": (lambda content: content[:2048] + b"x" * 512 + content[2560:], ["broken"], 1),
    "two in one file": (lambda content: content + content, ["broken"], 2),
    "no archive": (lambda content: b"x" * 5000, ["broken"], 0),
    "nothing": (lambda content: b"", ["truncated"], 0),
}


@pytest.mark.parametrize("case", ARCHIVE_DAMAGES)
def test_damaged_archives_are_never_silent(tmp_path, case):
    damage, kinds, num_good = ARCHIVE_DAMAGES[case]
    (tmp_path / "a.tar").write_bytes(damage(two_members()))
    assert [kind for kind, _, _ in problems_of(tmp_path / "a.tar")] == kinds
    assert sum(not record.problem for record in read_records([tmp_path / "a.tar"])) == num_good


def test_a_broken_member_does_not_end_the_archive(tmp_path):
    inner = lzma.compress(tar({"a.txt": b"a"}))
    members = {"0.xz": inner, "1.xz": inner[:-20], "README.md": b"what this is", "2.xz": inner, "3.txt": b"\xff"}
    (tmp_path / "a.tar").write_bytes(tar(members))
    records = list(read_records([tmp_path / "a.tar"]))
    assert [(record.file.split(":", 1)[1], record.problem and record.problem[0]) for record in records] == [
        ("0.xz:a.txt", None), ("1.xz:a.txt", None), ("1.xz", "truncated"), ("README.md", "unknown_member"),
        ("2.xz:a.txt", None), ("3.txt", None),
    ]  # fmt: skip


@pytest.mark.parametrize("read_bytes", [7, 1 << 18])
@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("c4-train.00000-of-01024.json.gz", gzip.compress),
        ("A.JSONL.GZ", gzip.compress),
        ("a.jsonl.zstd", zstandard_frame),
        ("a.ndjson.bz2", bz2.compress),
        ("a.jsonl", gzip.compress),  # wrong names
        ("a.jsonl.xz", zstandard_frame),
        ("a.json.gz", lambda content: content),
        ("0123abcd", gzip.compress),  # none
        ("a.gz", lambda content: gzip.compress(bz2.compress(content))),
    ],
)
def test_names_as_the_world_writes_them(tmp_path, monkeypatch, name, pack, read_bytes):
    monkeypatch.setattr(formats, "READ_BYTES", read_bytes)
    (tmp_path / name).write_bytes(pack(b"\xef\xbb\xbf" + jsonl(TEXTS)))
    assert list(read_texts(expand_inputs([f"{tmp_path}/*"]), "text")) == TEXTS


def test_what_is_packed_without_end_is_refused(tmp_path):
    content = jsonl(["a"])
    for _ in range(formats.MOST_NESTED + 1):
        content = gzip.compress(content)
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    assert problems_of(tmp_path / "a.jsonl.gz")[0][2] == "is packed more than 8 times over: unpack it first"


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.jsonl.gz", "a.txt.xz", "a.tar.gz", "a.json.bz2"])
def test_a_compressed_file_without_a_byte_is_truncated(tmp_path, name):
    (tmp_path / name).touch()
    ((kind, _, reason),) = problems_of(tmp_path / name)
    assert kind == "truncated" and "not even a beginning" in reason


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.jsonl.xz", "a.txt", "a.txt.gz", "a.tar"])
def test_a_document_that_is_too_long_is_passed_over(tmp_path, name):
    limit = 10_000
    inner = jsonl(["a", "x" * 3_000_000, "b"]) if "jsonl" in name else b"x" * 3_000_000
    if name == "a.tar":
        inner = tar({"0.txt": b"a", "1.txt": inner, "2.txt": b"b"})
    suffix = Path(name).suffix if Path(name).suffix in COMPRESS else ""
    (tmp_path / name).write_bytes(COMPRESS[suffix](inner))
    ((kind, line, reason),) = problems_of(tmp_path / name, max_document_bytes=limit)
    assert (kind, line) == ("too_long", 2 if "jsonl" in name else 1)
    assert "bytes, at most 10000 are read (--max-document-bytes)" in reason and "the record has 30000" in reason
    good = [record for record in read_records([tmp_path / name], ReadLimits("text", limit)) if not record.problem]
    assert [parse_record(record, "text") for record in good] == ([] if "txt" in name else ["a", "b"])


def test_a_bomb_comes_in_small_chunks(tmp_path):
    """A few kilobytes that turn into 300 MB must not be turned into them at once."""
    bomb = zstandard_frame(b"\0" * 300_000_000)
    assert len(bomb) < 100_000
    chunks = list(map(len, compression.decompress(compression.compression_of(".zst", "bomb"), [bomb])))
    assert sum(chunks) == 300_000_000 and max(chunks) <= compression.SLICE_BYTES // 4 * (1 << 17) + (1 << 18)


def test_members_that_are_no_files(tmp_path):
    """A hard link is to a member that has been read; what a symbolic link leads to may not be in the archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind in (("f.txt", tarfile.REGTYPE), ("h.txt", tarfile.LNKTYPE), ("s.txt", tarfile.SYMTYPE),
                           ("p.txt", tarfile.FIFOTYPE), ("c.txt", tarfile.CHRTYPE)):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = "f.txt" if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
            member.size = 3 if kind == tarfile.REGTYPE else 0
            archive.addfile(member, io.BytesIO(b"one"))
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    records = list(read_records([tmp_path / "a.tar"]))
    assert [(Path(record.file).name.split(":")[1], record.problem and record.problem[1]) for record in records] == [
        ("f.txt", None), ("s.txt", "is a link to 'f.txt', and links in archives are not followed"),
        ("p.txt", "is a device or a FIFO, not a file"), ("c.txt", "is a device or a FIFO, not a file"),
    ]  # fmt: skip


def test_members_are_known_by_their_content(tmp_path):
    page, parquet = b"<!DOCTYPE html><title>404", b"PAR1\x15\x00\x15\x10"
    members = {"0.jsonl": gzip.compress(jsonl(["a"])), "1": jsonl(["b"]), "2.jsonl": page, "3.parquet": parquet}
    (tmp_path / "a.tar").write_bytes(tar(members))
    records = list(read_records([tmp_path / "a.tar"]))
    assert [parse_record(record, "text") for record in records[:2]] == ["a", "b"]
    assert [record.problem[0] for record in records[2:]] == ["unknown_member"] * 2
    assert "an HTML page" in records[2].problem[1] and "a Parquet file within another file" in records[3].problem[1]


@pytest.fixture
def write_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(columns: dict | list, names: list[str] | None = None, **options) -> Path:
        parquet.write_table(pyarrow.table(columns, names=names), tmp_path / "a.parquet", **options)
        return tmp_path / "a.parquet"

    return write


@pytest.mark.parametrize("options", [{}, {"row_group_size": 2}, {"compression": "zstd", "use_dictionary": False}])
@pytest.mark.parametrize(
    "kind", ["string", "large_string", "binary", "large_binary", "string_view", "binary_view", "dictionary"]
)
def test_parquet(write_parquet, options, kind):
    import pyarrow

    column = pyarrow.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pyarrow, kind)())
    path = write_parquet({"id": [1, 2, 3, 4], "text": column}, **options)
    assert texts_of(path) == TEXTS
    sizes: list[int] = []
    lines = [record.line for record in read_records([path], on_read=sizes.append)]
    assert lines == [1, 2, 3, 4] and 0 < sum(sizes) <= path.stat().st_size


def test_bad_rows_of_parquet(write_parquet):
    path = write_parquet({"text": ["a", None, "x" * 50, ""]})
    found = problems_of(path, max_document_bytes=20)
    assert [(kind, line) for kind, line, _ in found] == [("not_text", 2), ("too_long", 3)]


LOST = "so that 1 row cannot be read"
WITHOUT_TEXT = {
    "missing": (["a", 1], ["body", "id"], "missing_field", f"missing column 'text', its columns are body, id, {LOST}"),
    "number": ([1], ["text"], "not_text", f"column 'text' is of type int64, not a string, {LOST}: name another"),
    "null": ([None], ["text"], "not_text", f"column 'text' is of type null, not a string, {LOST}: name another"),
    "list": ([["a", "b"]], ["text"], "not_text", f"list<element: string>, not a string, {LOST}: join its items to one"),
    "struct": ([{"body": "a"}], ["text"], "not_text", "make the field of it that holds the text (body) a column"),
    "nested": ([{"text": "a"}], ["meta"], "missing_field", f"columns are meta, {LOST}; make meta.text a column"),
    "twice": (
        ["a", "b"],
        ["text", "text"],
        "repeated_field",
        f"2 columns are called 'text', {LOST}: rename all but one",
    ),
}


@pytest.mark.parametrize("case", WITHOUT_TEXT)
def test_parquet_without_the_column(write_parquet, case):
    import pyarrow

    values, names, kind, reason = WITHOUT_TEXT[case]
    path = write_parquet([pyarrow.array([value]) for value in values], names)
    ((found, line, said),) = problems_of(path)
    assert (found, line) == (kind, 1) and reason in said
    with pytest.raises(DataError, match=r"a\.parquet: .* 1 row cannot be read"):
        check_columns([path], "text")


def test_parquet_takes_the_column_of_that_very_name(write_parquet):
    import pyarrow

    nested = pyarrow.array([{"b": "nested"}])
    for order in (1, -1):
        columns, names = [nested, pyarrow.array(["flat"])][::order], ["a", "a.b"][::order]
        path = write_parquet(columns, names)
        check_columns([path], "a.b")
        assert [record.payload for record in read_records([path], ReadLimits("a.b"))] == [b"flat"]


@pytest.mark.parametrize("damage", ["truncated", "rubbish", "flipped"])
def test_damaged_parquet(write_parquet, damage):
    path = write_parquet({"text": [str(number) * 50 for number in range(1000)]}, row_group_size=100)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-10:]
    elif damage == "rubbish":
        content[:] = b"x" * 500
    else:
        content[len(content) // 2 : len(content) // 2 + 400] = b"\xff" * 400
    path.write_bytes(content)
    ((kind, _, reason),) = problems_of(path)
    assert kind == "broken" and "\n" not in reason and len(reason) < 300


def test_parquet_without_its_package(tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet: needs the package pyarrow: pip install 'megatron_tf\[parquet\]'"):
        list(read_records([tmp_path / "a.parquet"]))


def test_raw_records_stay_small():
    """They travel between processes."""
    assert RawRecord("f", 1, b"x")._asdict() == {
        "file": "f",
        "line": 1,
        "payload": b"x",
        "is_json": False,
        "problem": None,
    }
