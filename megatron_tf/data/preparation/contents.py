"""Recognises what a file holds: by its first bytes, and by its name where they do not suffice.

| name                                                        | content                                         |
|-------------------------------------------------------------|-------------------------------------------------|
| .jsonl .ndjson .json .jsonlines .jl .ldjson                 | one JSON object a line                          |
| .txt .text                                                  | one document                                    |
| .tar                                                        | an archive of files of these formats            |
| .parquet .pq                                                | one document a row                              |
| each but the last + .zst .zstd .gz .gzip .xz .bz2 .bzip2    | the same, compressed                            |
| .tgz .tbz .tbz2 .txz .tzst                                  | a compressed .tar                               |

Compressed data, archives, Parquet and JSON lines that begin with an object are recognised whatever their name.
"""

from __future__ import annotations

import codecs
import os
from typing import Literal, NamedTuple

HEAD_BYTES = 1 << 12  # bytes at the beginning of a file, enough to recognise it
BYTE_ORDER_MARK = codecs.BOM_UTF8
KNOWN = ".jsonl, .ndjson, .json, .txt and .tar, each also with .zst, .gz, .xz or .bz2, .tgz and .parquet"

Kind = Literal["compressed", "archive", "parquet", "lines", "text", "unknown"]

_COMPRESSED = {
    ".zst": ".zst",
    ".zstd": ".zst",
    ".gz": ".gz",
    ".gzip": ".gz",
    ".xz": ".xz",
    ".bz2": ".bz2",
    ".bzip2": ".bz2",
}
_ARCHIVES = {".tgz": ".gz", ".tbz": ".bz2", ".tbz2": ".bz2", ".txz": ".xz", ".tzst": ".zst"}
_KINDS: dict[str, Kind] = {
    **dict.fromkeys((".jsonl", ".ndjson", ".json", ".jsonlines", ".jl", ".ldjson"), "lines"),
    **dict.fromkeys((".txt", ".text"), "text"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    ".tar": "archive",
}

_UNPACK = "unpack it first"
_CONVERT = "save it as .jsonl or .parquet"
_AGAIN = "download it again"
_UTF8 = "convert it to UTF-8: iconv -f {0} -t UTF-8"
# (offset, bytes, what it is, remedy); of two with a common beginning the longer one comes first
_FOREIGN = (
    (0, b"PK\x03\x04", "a zip archive", _UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", _AGAIN),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file", _UNPACK),
    (0, b"\xff\x06\x00\x00sNaPpY", "a Snappy file", _UNPACK),
    (0, b"LZIP", "an lzip file", _UNPACK),
    (0, b"\x1f\x9d", "a file of Unix' compress", _UNPACK),
    (0, b"PARE", "an encrypted Parquet file", "decrypt it first"),
    (0, b"ARROW1\x00\x00", "an Arrow IPC (Feather) file", _CONVERT),
    (0, b"\xff\xff\xff\xff", "an Arrow IPC stream, as Hugging Face datasets keeps it", _CONVERT),
    (0, b"FEA1", "a Feather file", _CONVERT),
    (0, b"ORC", "an ORC file", _CONVERT),
    (0, b"Obj\x01", "an Avro file", _CONVERT),
    (0, b"SQLite format 3\x00", "an SQLite database", _CONVERT),
    (16, b"\xde\xc0\xef\xbe", "an LMDB database", _CONVERT),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (0, b"\x93NUMPY", "a NumPy array", _CONVERT),
    *((0, bytes([0x80, version]), "a Python pickle", _CONVERT) for version in range(2, 6)),
    (0, b"MMIDIDX\x00\x00", "an index of token files", "these are prepared already: name them under data.train"),
    (0, b"\x00\x05\x16\x07", "an AppleDouble file, which macOS adds to archives", "remove it"),
    (0, b"%PDF-", "a PDF document", "extract its text first"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a Microsoft Office document", "extract its text first"),
    (0, b"\x89PNG", "an image", "remove it"),
    (0, b"\xff\xd8\xff", "an image", "remove it"),
    (0, b"\x7fELF", "a program", "remove it"),
    (0, codecs.BOM_UTF32_LE, "UTF-32 text", _UTF8.format("UTF-32")),
    (0, codecs.BOM_UTF32_BE, "UTF-32 text", _UTF8.format("UTF-32")),
    (0, codecs.BOM_UTF16_LE, "UTF-16 text", _UTF8.format("UTF-16")),
    (0, codecs.BOM_UTF16_BE, "UTF-16 text", _UTF8.format("UTF-16")),
)
_POINTERS = (
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "run git lfs pull"),
    (b"/annex/objects/", "a git-annex pointer, not the file itself", "run git annex get"),
)
# These may well be the text of a document, but never JSON lines. They are compared in lower case.
_MARKUP = (
    (b"<!doctype html", "an HTML page, as servers send it in the place of a file", _AGAIN),
    (b"<html", "an HTML page, as servers send it in the place of a file", _AGAIN),
    (b"<?xml", "an XML document, as servers send it in the place of a file", _AGAIN),
    (b"warc/1.", "a WARC file", "extract its text first"),
)


class Content(NamedTuple):
    kind: Kind
    detail: str = ""  # compressed: the compression, by its suffix; unknown: what it is and what to do, as a phrase


def content_of(head: bytes, name: str) -> Content:
    """What a file called `name` holds. `head`: its first `HEAD_BYTES`, or all of it."""
    _, compression = split_name(name)
    named = kind_by_name(name)
    is_text = looks_like_text(head)
    found = _foreign_text(head, named) if is_text else _packed(head) or _foreign(head)
    if found is not None:
        return found
    if compression and not (head and is_text):
        return Content("compressed", compression)
    if named is not None:
        return Content(named)
    if head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"{"):
        return Content("lines")
    what = "empty" if not head else "text" if is_text else f"binary data that begin with {head[:8]!r}"
    hint = ". Name it .txt if it is one document" if head and is_text else ""
    return Content("unknown", f"unknown kind of file ({what}, and its name does not say more); known are {KNOWN}{hint}")


def split_name(name: str) -> tuple[str, str]:
    """(name without the ending of its compression, in lower case; the compression by its suffix, or "")."""
    stem, ending = os.path.splitext(name.lower())
    if ending in _ARCHIVES:
        return f"{stem}.tar", _ARCHIVES[ending]
    if ending in _COMPRESSED:
        return stem, _COMPRESSED[ending]
    return name.lower(), ""


def kind_by_name(name: str) -> Kind | None:
    """The kind that a name stands for, without the ending of its compression; None for an unknown ending."""
    return _KINDS.get(os.path.splitext(split_name(name)[0])[1])


def looks_like_text(head: bytes) -> bool:
    """Whether `head` is UTF-8 without NUL characters; its last character may be cut off."""
    if b"\0" in head:
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True


def _packed(head: bytes) -> Content | None:
    """The content of binary data that are compressed, an archive or Parquet; else None."""
    if head.startswith(b"\x1f\x8b"):
        return Content("compressed", ".gz")
    # The second is a frame that zstandard skips, with which some programs begin.
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5):
        return Content("compressed", ".zst")
    if head.startswith(b"\xfd7zXZ\x00"):
        return Content("compressed", ".xz")
    if head.startswith(b"BZh") and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return Content("compressed", ".bz2")
    if head[257:262] == b"ustar":
        return Content("archive")
    if head.startswith(b"PAR1"):
        return Content("parquet")
    return None


def _foreign(head: bytes) -> Content | None:
    for place, signature, what, remedy in _FOREIGN:
        if head.startswith(signature, place):
            return Content("unknown", f"is {what}: {remedy}")
    # UTF-16 without a byte order mark: in mostly ASCII text every other byte is 0.
    for order, high, low in (("LE", head[1::2], head[::2]), ("BE", head[::2], head[1::2])):
        if high.count(0) > len(high) / 2 and 0 not in low:
            return Content("unknown", f"is UTF-16 text: {_UTF8.format('UTF-16' + order)}")
    return None


def _foreign_text(head: bytes, named: Kind | None) -> Content | None:
    start = head.removeprefix(BYTE_ORDER_MARK).lstrip()[:64].lower()
    for signature, what, remedy in _POINTERS if named == "text" else (*_POINTERS, *_MARKUP):
        if start.startswith(signature):
            return Content("unknown", f"is {what}: {remedy}")
    return None
