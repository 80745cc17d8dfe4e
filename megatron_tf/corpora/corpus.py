"""Real text that every machine with Python has: Python's own documentation, and the source of its standard library."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_tf.data.preparation.split import is_held_out
from megatron_tf.durable import atomic_path, prepare_output, write_atomically
from megatron_tf.errors import DataError, file_errors, write_errors

VALIDATION_FRACTION = 0.05
# Tests, tables of characters, third-party packages, and the topics, which `python_topics` reads.
EXCLUDED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "idlelib",
        "idle_test",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
    }
)
LICENSE_NOTE = """\
train.jsonl.zst and validation.jsonl.zst hold documentation of Python {version}.
Copyright (c) 2001 Python Software Foundation; All Rights Reserved.
They are used under the Python Software Foundation License Version 2: https://docs.python.org/3/license.html
"""


@dataclass(frozen=True)
class Document:
    name: str  # within its source: "topic:...", "module:...", a path in the package or a title
    text: str
    group: str = ""  # documents of one group go to the same side of a split; by default each is its own


def python_topics() -> Iterator[Document]:
    """The chapters of the language reference that `help()` shows, in alphabetical order; none where not installed."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield Document(f"topic:{name}", topics[name])


def python_modules() -> Iterator[Document]:
    """Source, docstrings included, of the standard library's modules, in an order that mixes its packages."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        # The build's own settings (_sysconfigdata) and config-* folders name the machine, not the language.
        machine_made = parts[0].startswith(("_sysconfigdata", "config-"))
        if not machine_made and EXCLUDED_FOLDERS.isdisjoint(parts[:-1]):
            modules["module:" + ".".join(parts).removesuffix(".py").removesuffix(".__init__")] = path
    for name in sorted(modules, key=lambda name: hashlib.sha256(name.encode()).digest()):
        try:
            with tokenize.open(modules[name]) as file:
                yield Document(name, file.read())
        except (SyntaxError, UnicodeDecodeError):
            continue  # a few modules hold bad source on purpose


def python_docstrings() -> Iterator[Document]:
    """The docstrings of each module of `python_modules`, in the order in which they stand there: English, not code."""
    for module in python_modules():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated escapes, in code that is not ours
            try:
                nodes = list(ast.walk(ast.parse(module.text)))
            except (SyntaxError, ValueError):
                continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [node for node in nodes if isinstance(node, documented)]
        found.sort(key=lambda node: getattr(node, "lineno", 0))
        texts = [text for node in found if (text := ast.get_docstring(node))]
        yield Document(module.name, "\n\n".join(texts))


def within_bytes(documents: Iterable[Document], limit_bytes: int) -> Iterator[Document]:
    """The documents that have text, in order, without those that would go beyond the limit (bytes of UTF-8)."""
    total = 0
    for document in documents:
        size = len(document.text.encode("utf-8"))
        if document.text.strip() and total + size <= limit_bytes:
            total += size
            yield document


def write_corpus(documents: Iterable[Document], folder: Path, version: str) -> dict[str, tuple[int, int]]:
    """Write train.jsonl.zst, validation.jsonl.zst and LICENSE.txt; returns (documents, bytes of text) of each split.

    A line is {"name", "text"}; the split is by hash of the name. Raises `DataError` when zstandard is missing, when a
    split would be empty, and when the folder cannot be written or has files of these names from elsewhere; older files
    are then unchanged, and nothing half-written stays.
    """
    try:
        import zstandard
    except ImportError:
        raise DataError("the corpus needs the package zstandard: pip install 'megatron_tf'") from None
    counts = {"train": (0, 0), "validation": (0, 0)}
    paths = {split: folder / f"{split}.jsonl.zst" for split in counts}
    note = folder / "LICENSE.txt"
    for path in (note, *paths.values()):
        prepare_output(path)
    with file_errors(DataError, note, "Choose another folder."):
        is_ours = note.is_file() and note.read_bytes().startswith(LICENSE_NOTE.partition("{")[0].encode("utf-8"))
    if not is_ours and (found := [path for path in (note, *paths.values()) if path.exists()]):
        raise DataError(f"{found[0]}: is there, and is none of this corpus. Move it away, or choose another folder.")
    with write_errors(DataError, folder, "Choose another folder."), ExitStack() as stack:
        streams = {}
        for split, path in paths.items():
            file = stack.enter_context(open(stack.enter_context(atomic_path(path)), "wb"))
            streams[split] = stack.enter_context(zstandard.ZstdCompressor(level=9).stream_writer(file))
        for document in documents:
            split = "validation" if is_held_out(document.name.encode("utf-8"), VALIDATION_FRACTION) else "train"
            line = json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False)
            streams[split].write(line.encode("utf-8") + b"\n")
            number, size = counts[split]
            counts[split] = (number + 1, size + len(document.text.encode("utf-8")))
        for split, (number, _) in counts.items():
            if number == 0:
                raise DataError(f"{folder}: no document for {split}. Raise the number of megabytes.")
        write_atomically(note, LICENSE_NOTE.format(version=version).encode("utf-8"))
    return counts
