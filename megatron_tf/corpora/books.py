"""Reads books from the formats in which packages keep them: R's data, SWORD modules, a compressed Bible."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from megatron_tf.errors import DataError

# R's serialisation, format 3 in big endian ("X\n"), of a vector of strings: the code page, then flags and length.
R_HEAD = b"X\n\x00\x00\x00\x03"
R_STRINGS = 16  # type of a vector of strings, in the low byte of its flags
KJV_MAGIC = b"EC02Compressed Data File"
KJV_NUM_WINDOWS = 0x58  # big endian u32: the number of windows, then the first byte of each and the end of the last
LZW_CLEAR = 256
LZW_BITS = (9, 16)

_NOTE = re.compile(r"\s*<note\b[^>]*(?<!/)>.*?</note>", re.DOTALL)
_SPACE_BEFORE_MARK = re.compile(r" (?=[,.;:!?’”])")
_BREAK = re.compile(r'<(?:(?:div|title|/title|lg|chapter|l|p|/p|lb)\b|milestone type="x-p")[^>]*>')
_TAG = re.compile(r"<[^>]*>")
_VERSE = re.compile(r"(\d?[A-Z][A-Za-z]*)(\d+):(\d+) ")


def r_strings(database: bytes) -> Iterator[list[str]]:
    """The vectors of strings in an R package's data (.rdb), a sequence of chunks: a big endian u32, then zlib data."""
    place = 0
    while place + 4 <= len(database):
        stream = zlib.decompressobj()
        content = stream.decompress(database[place + 4 :])
        place = len(database) - len(stream.unused_data)
        if content.startswith(R_HEAD):
            code_page = 18 + struct.unpack_from(">I", content, 14)[0]
            (flags,) = struct.unpack_from(">I", content, code_page)
            if flags & 0xFF == R_STRINGS:
                yield list(_strings(content, code_page + 4))


def _strings(content: bytes, place: int) -> Iterator[str]:
    (count,) = struct.unpack_from(">I", content, place)
    place += 4
    for _ in range(count):
        _, size = struct.unpack_from(">Ii", content, place)
        place += 8
        size = max(size, 0)  # -1 stands for a missing value
        yield content[place : place + size].decode("utf-8", errors="replace")
        place += size


def sword_books(index: bytes, blocks: bytes) -> Iterator[str]:
    """The books of a SWORD module that is compressed by book, without markup and notes.

    `index` (.bzs) has three little endian u32 per block: offset and size in `blocks` (.bzz, zlib) and size of the text,
    all in bytes.
    """
    for start, size, _ in struct.iter_unpack("<III", index):
        text = zlib.decompress(blocks[start : start + size]).decode("utf-8", errors="replace")
        text = _BREAK.sub("\n\n", _NOTE.sub(" ", text))
        paragraphs = (" ".join(_TAG.sub("", paragraph).split()) for paragraph in text.split("\n\n"))
        if book := "\n\n".join(filter(None, paragraphs)):
            yield _SPACE_BEFORE_MARK.sub("", book)


def kjv_books(data: bytes, where: str) -> Iterator[tuple[str, str]]:
    """(abbreviation, text) of the books of bible.data, one paragraph per chapter. `where` names it in messages.

    Raises `DataError` for data that begin otherwise or are damaged.
    """
    if not data.startswith(KJV_MAGIC):
        raise DataError(f"{where}: begins with {data[:8]!r}, not with {KJV_MAGIC[:4]!r}: an unknown version.")
    (count,) = struct.unpack_from(">I", data, KJV_NUM_WINDOWS)
    ends = struct.unpack_from(f">{count + 1}I", data, KJV_NUM_WINDOWS + 4)
    text = b"".join(lzw(data[start:end]) for start, end in zip(ends, ends[1:], strict=False)).decode("latin-1")
    book, chapter, paragraphs = "", "", [[""]]
    for line in text.splitlines():
        match = _VERSE.match(line)
        if match is None:  # the title
            continue
        if match[1] != book:
            if book:
                yield book, "\n\n".join(" ".join(verses) for verses in paragraphs)
            book, chapter, paragraphs = match[1], "", []
        if match[2] != chapter:
            chapter = match[2]
            paragraphs.append([])
        paragraphs[-1].append(line[match.end() :].strip())
    if book:
        yield book, "\n\n".join(" ".join(verses) for verses in paragraphs)


def lzw(data: bytes) -> bytes:
    """Decompress what Unix' `compress` wrote, without its header: codes of 9 to 16 bits, the low bits first.

    Codes come in groups of eight; where their width changes, the rest of the group is padding. Raises `DataError` for a
    code that cannot be.
    """
    out = bytearray()
    least, most = LZW_BITS
    table = [bytes([byte]) for byte in range(256)] + [b""]
    place, count, width = 0, 0, least
    before = b""
    while place + width <= 8 * len(data):
        code = int.from_bytes(data[place // 8 : place // 8 + 4], "little") >> place % 8 & (1 << width) - 1
        place, count = place + width, count + 1
        if code == LZW_CLEAR:
            place, count, width, before = place + -count % 8 * width, 0, least, b""
            del table[LZW_CLEAR + 1 :]
            continue
        if code > len(table) or (code == len(table) and not before):
            raise DataError(f"compressed text is broken at byte {place // 8}. Delete the package and run again.")
        entry = table[code] if code < len(table) else before + before[:1]
        if before and len(table) < 1 << most:
            table.append(before + entry[:1])
        out += entry
        before = entry
        if len(table) >= 1 << width and width < most:
            place, count, width = place + -count % 8 * width, 0, width + 1
    return bytes(out)
