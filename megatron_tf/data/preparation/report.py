"""`PREFIX.report.json`: what a preparation read, wrote and left out, and why. Each finished part has such a report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tf.data.losses import Loss
from megatron_tf.data.preparation.record_types import BadSample, KeptSample
from megatron_tf.durable import read_plain, write_atomically
from megatron_tf.errors import NOT_AS_WRITTEN, DataError, file_errors
from megatron_tf.telemetry.text import count_of

FORMAT = "megatron_tf preparation 1"
MOST_BYTES = 1 << 28  # of a report, which may list millions of input files
SAMPLES_PER_KIND = 10


@dataclass
class SplitCounts:
    """Counts of one pair of token files."""

    documents: int = 0
    tokens: int = 0  # with the end-of-document tokens
    bytes: int = 0  # of the documents' text in UTF-8
    max_token_id: int = -1

    def add(self, other: SplitCounts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.max_token_id = max(self.max_token_id, other.max_token_id)


@dataclass
class Report:
    """Counts and samples of a part, or of a whole preparation."""

    splits: dict[str, SplitCounts]  # by ending of the prefix: "" for all, or "_train" and "_validation"
    skipped: Counter[str] = field(default_factory=Counter)  # kind of bad record -> how many
    samples: list[BadSample] = field(default_factory=list)  # the first of each kind
    seconds: float = 0.0  # summed over the processes that read
    kept: Counter[str] = field(default_factory=Counter)  # kind of remark about a prepared document -> how many
    kept_samples: list[KeptSample] = field(default_factory=list)  # the first of each kind
    loss: Loss = field(default_factory=Loss)  # characters of prepared documents that the tokenizer lost

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    @property
    def empty(self) -> int:
        return self.skipped["empty"]

    @property
    def bad(self) -> int:
        """Number of records that were left out, without empty ones."""
        return self.skipped.total() - self.empty

    def add_bad(self, samples: Iterable[BadSample]) -> None:
        for sample in samples:
            self.skipped[sample.kind] += 1
            if self.skipped[sample.kind] <= SAMPLES_PER_KIND:
                self.samples.append(sample)

    def add_kept(self, samples: Iterable[KeptSample], loss: Loss) -> None:
        """Count remarks about a batch's documents, and the characters lost of them."""
        for sample in samples:
            self.kept[sample.kind] += 1
            if self.kept[sample.kind] <= SAMPLES_PER_KIND:
                self.kept_samples.append(sample)
        self.loss.add(loss)

    def add(self, other: Report) -> None:
        """Add the report of the part that follows."""
        for ending, counts in other.splits.items():
            self.splits[ending].add(counts)
        for sample in other.samples:
            if sum(known.kind == sample.kind for known in self.samples) < SAMPLES_PER_KIND:
                self.samples.append(sample)
        for remark in other.kept_samples:
            if sum(known.kind == remark.kind for known in self.kept_samples) < SAMPLES_PER_KIND:
                self.kept_samples.append(remark)
        self.skipped.update(other.skipped)
        self.kept.update(other.kept)
        self.loss.add(other.loss)
        self.seconds += other.seconds

    def remarks(self) -> list[str]:
        """Remarks about the prepared documents, one sentence each."""
        found = []
        if self.loss:
            found.append(
                f"the tokenizer has no token for {self.loss} of {count_of(self.kept['lost_text'], 'document')}, which "
                "are lost"
            )
        if self.kept["encoded_whole"]:
            found.append(
                f"encoded at once, because tokens depend on text far away: "
                f"{count_of(self.kept['encoded_whole'], 'long document')}"
            )
        return found


def write_report(path: Path, report: Report, key: str, files: Sequence[str]) -> None:
    """Write the report whole or not at all. `key`: of the part or preparation it belongs to; `files`: its inputs."""
    content = {
        "format": FORMAT,
        "key": key,
        "documents": report.documents,
        "tokens": sum(split.tokens for split in report.splits.values()),
        "bytes": sum(split.bytes for split in report.splits.values()),
        "skipped_records": report.skipped.total(),
        "skipped": dict(sorted(report.skipped.items())),
        "samples": [sample._asdict() for sample in report.samples],
        "lost_characters": report.loss.characters,
        "lost": dict(report.loss.pieces.most_common()),
        "kept": dict(sorted(report.kept.items())),
        "kept_samples": [sample._asdict() for sample in report.kept_samples],
        "splits": {ending: vars(counts) for ending, counts in report.splits.items()},
        "process_seconds": round(report.seconds, 3),
        "files": list(files),
    }
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode("utf-8"))


def read_report(path: Path, key: str) -> Report | None:
    """The report at `path`; None when there is none, or none of the work `key`. `DataError` when it cannot be read."""
    with file_errors(DataError, path, "Make it readable, or delete it to prepare the data again."):
        try:
            raw = read_plain(path, MOST_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        content: Any = json.loads(raw)
        if content["format"] != FORMAT or content["key"] != key:
            return None
        report = Report(
            splits={ending: SplitCounts(**counts) for ending, counts in content["splits"].items()},
            skipped=Counter(content["skipped"]),
            samples=[BadSample(**sample) for sample in content["samples"]],
            kept=Counter(content["kept"]),
            kept_samples=[KeptSample(**sample) for sample in content["kept_samples"]],
            loss=Loss(content["lost_characters"], Counter(content["lost"])),
            seconds=content["process_seconds"],
        )
        return report if _is_sound(report) else None
    except NOT_AS_WRITTEN:
        return None  # not ours, or damaged: the work is done again


def _is_sound(report: Report) -> bool:
    """Whether everything that is added up later is a number."""
    counts = [number for split in report.splits.values() for number in vars(split).values()]
    counts += [*report.skipped.values(), *report.kept.values(), *report.loss.pieces.values(), report.loss.characters]
    return all(type(count) is int for count in counts) and type(report.seconds) in (int, float)
