"""Tiny packages, and package managers that hand them out."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import sys
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

SENTENCE = "It is a truth that the number {} was in want of a name, and that it had to be found by them. "

APT_CACHE = """#!{python}
import json, sys
known = json.load(open({index!r}))
name = sys.argv[-1]
if name not in known:
    sys.exit("E: No packages found")
print("Package: " + name + "\\nVersion: 1.0-1\\nSHA256: " + known[name]["sha256"])
"""
APT_GET = """#!{python}
import json, pathlib, shutil, sys
known = json.load(open({index!r}))
name = sys.argv[-1].split("=")[0]
with open({log!r}, "a") as log:
    print(name, file=log)
shutil.copy(known[name]["path"], ".")
"""


def prose(number: int, sentences: int = 30) -> str:
    """Text of which no paragraph is another number's."""
    return "\n\n".join((SENTENCE.format(f"{number} of {line}") * 2).strip() for line in range(sentences))


def tar(files: Mapping[str, bytes], kind: str = "gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{kind}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def deb(files: Mapping[str, bytes], kind: str = "xz") -> bytes:
    """`kind`: xz, gz or zst."""
    content = tar({f"./{name}": data for name, data in files.items()}, "" if kind == "zst" else kind)
    if kind == "zst":
        import zstandard

        content = zstandard.ZstdCompressor().compress(content)
    parts = [b"!<arch>\n"]
    for name, data in {"debian-binary": b"2.0\n", "control.tar.gz": tar({}), f"data.tar.{kind}": content}.items():
        parts.append(f"{name:16}{0:<12}{0:<6}{0:<6}{'100644':8}{len(data):<10}`\n".encode())
        parts.append(data + b"\n" * (len(data) % 2))
    return b"".join(parts)


def pages(package: str, numbers: range) -> dict[str, bytes]:
    """The content of a package of documentation with a page for each number."""
    files = {f"usr/share/doc/{package}/copyright": f"Licence of {package}.".encode()}
    for number in numbers:
        paragraphs = "".join(f"<p>{paragraph}</p>" for paragraph in prose(number).split("\n\n"))
        page = f"<html><head><title>x</title></head><body><nav>menu</nav>{paragraphs}</body></html>"
        files[f"usr/share/doc/{package}/html/{number}.html"] = page.encode()
    return files


def serve_apt(folder: Path, packages: Mapping[str, bytes]) -> Path:
    """apt-get and apt-cache that know `packages`, in the folder that is returned; FOLDER/log names what was fetched."""
    (folder / "bin").mkdir(parents=True)
    known = {}
    for name, content in packages.items():
        path = folder / f"{name}_1.0-1_all.deb"
        path.write_bytes(content)
        known[name] = {"path": str(path), "sha256": hashlib.sha256(content).hexdigest()}
    index = folder / "index.json"
    index.write_text(str(known).replace("'", '"'))
    for name, script in {"apt-cache": APT_CACHE, "apt-get": APT_GET}.items():
        script = script.format(python=sys.executable, index=str(index), log=str(folder / "log"))
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    return folder / "bin"


def path_with(folder: Path | None) -> str:
    """PATH with `folder` in front; with None, one on which there is no apt."""
    if folder is not None:
        return f"{folder}{os.pathsep}{os.environ['PATH']}"
    folders = os.environ["PATH"].split(os.pathsep)
    return os.pathsep.join(item for item in folders if not (Path(item) / "apt-get").exists())


def sdist(name: str, version: str, files: Mapping[str, bytes], marker: Path) -> bytes:
    """A source archive whose setup.py would write `marker`."""
    setup = (
        f"open({str(marker)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name={name!r}, version={version!r})\n"
    )
    content = {"setup.py": setup.encode(), "PKG-INFO": f"Metadata-Version: 1.0\nName: {name}\n".encode(), **files}
    return tar({f"{name}-{version}/{path}": data for path, data in content.items()})


def lzw(data: bytes) -> bytes:
    """As Unix' `compress` writes it, without a header."""
    out, bits, used = bytearray(), 0, 0
    table, width, count = {bytes([byte]): byte for byte in range(256)}, 9, 0
    size = 257

    def put(code: int) -> None:
        nonlocal bits, used
        bits |= code << used
        used += width

    word = b""
    for byte in data:
        if word + bytes([byte]) in table:
            word += bytes([byte])
            continue
        put(table[word])
        count += 1
        # The reader adds an entry one code later than the writer, and changes its width with its own table.
        if size < 1 << 16:
            table[word + bytes([byte])] = size
            size += 1
        if size - 1 >= 1 << width and width < 16:
            used += -count % 8 * width
            width, count = width + 1, 0
        word = bytes([byte])
    put(table[word])
    out += bits.to_bytes((used + 7) // 8, "little")
    return bytes(out)


def kjv_data(windows: list[bytes]) -> bytes:
    packed = [lzw(window) for window in windows]
    head = b"EC02Compressed Data File".ljust(0x58, b"\0") + struct.pack(">I", len(packed))
    start = len(head) + 4 * (len(packed) + 1)
    ends = [start]
    for window in packed:
        ends.append(ends[-1] + len(window))
    return head + struct.pack(f">{len(ends)}I", *ends) + b"".join(packed)


def r_data(*vectors: list[str]) -> bytes:
    chunks = []
    for lines in vectors:
        content = b"X\n" + struct.pack(">III", 3, 0x40201, 0x30500) + struct.pack(">I", 5) + b"UTF-8"
        content += struct.pack(">II", 16, len(lines))
        for line in lines:
            content += struct.pack(">II", 0x40009, len(line.encode())) + line.encode()
        chunks.append(struct.pack(">I", len(content)) + zlib.compress(content))
    return b"".join(chunks)


def sword_module(books: list[str]) -> tuple[bytes, bytes]:
    """(index, blocks)."""
    index, blocks = b"", b""
    for book in books:
        block = zlib.compress(book.encode())
        index += struct.pack("<III", len(blocks), len(block), len(book.encode()))
        blocks += block
    return index, blocks
