"""The parts of a preparation: units of work that are written, finished and resumed independently.

A part is one input file (several, when there are very many). Its tokens stand in `PREFIX.parts/KEY*.bin` and `.idx`,
and it is finished when `KEY.json` exists. The key is a hash of everything that decides the content, so that a changed
file or another tokenizer makes another part. Any run that needs a finished part finds it, and any number of processes
on any number of nodes may work on the same preparation.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tf.data.indexed import IndexedDataset
from megatron_tf.data.preparation.report import Report, read_report
from megatron_tf.errors import DataError, file_errors

MOST_PARTS = 4096  # more input files share parts; each part costs three files until the merge


@dataclass(frozen=True)
class Part:
    folder: Path  # PREFIX.parts
    key: str
    files: tuple[Path, ...]
    bytes: int  # of the files

    @property
    def report_path(self) -> Path:
        return self.folder / f"{self.key}.json"

    @property
    def lock_path(self) -> Path:
        return self.folder / f"{self.key}.lock"

    def prefix(self, ending: str) -> Path:
        return self.folder / f"{self.key}{ending}"

    def report(self) -> Report | None:
        """Its report; None unless the part is finished and its token files are whole. `DataError` if unreadable."""
        report = read_report(self.report_path, self.key)
        if report is None:
            return None
        for ending, counts in report.splits.items():
            try:
                dataset = IndexedDataset(self.prefix(ending))
            except DataError:  # missing or truncated: the part is written again
                return None
            if (dataset.num_documents, dataset.num_tokens) != (counts.documents, counts.tokens):
                return None
        return report

    def discard(self) -> None:
        """Remove its files."""
        for path in self.folder.glob(f"{self.key}*"):
            path.unlink(missing_ok=True)


def plan_parts(prefix: str, files: Sequence[Path], settings: object) -> list[Part]:
    """All parts, in the order in which they are merged. `DataError` for a file that cannot be read.

    `settings`: everything besides the files that decides the content, as a JSON value.
    """
    per_part = -(-len(files) // MOST_PARTS)
    parts = []
    for start in range(0, len(files), per_part):
        members = tuple(files[start : start + per_part])
        states = []
        for path in members:
            with file_errors(DataError, path, "Make it readable, or leave it out."):
                states.append(os.stat(path))
                if not os.access(path, os.R_OK):  # reported now, not in hours when its turn comes
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        described = [(str(path), state.st_size, state.st_mtime_ns) for path, state in zip(members, states, strict=True)]
        key = key_of([settings, described])
        parts.append(Part(Path(f"{prefix}.parts"), key, members, sum(state.st_size for state in states)))
    return parts


def key_of(content: object) -> str:
    """A name for `content`, a JSON value: 24 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]
