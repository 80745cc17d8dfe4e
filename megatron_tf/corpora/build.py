"""From sources to a corpus: texts are fetched, cleaned, split, deduplicated, and written with their licences."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_tf.corpora.catalogue import Opened, Source
from megatron_tf.corpora.cleaning import LEAST_CHARACTERS, Deduplicator, clean, is_english
from megatron_tf.corpora.corpus import Document
from megatron_tf.corpora.packages import Downloads, UnavailableError
from megatron_tf.corpora.shards import ShardWriter
from megatron_tf.data.preparation.split import is_held_out
from megatron_tf.durable import file_lock, partial_path, prepare_output, sync_folder
from megatron_tf.errors import DataError, write_errors
from megatron_tf.telemetry.text import count_of

REPORT = "corpus.json"  # marks a folder as a corpus, which a later run may replace
LICENSES = "LICENSES.txt"
REMEDY = "Choose another folder."
SPLITS = ("validation", "train")  # validation first: a text that is in both is then left out of training


@dataclass(frozen=True)
class CorpusSettings:
    folder: Path
    sources: tuple[Source, ...]  # within a split, a text of two sources is kept for the first of them
    held_out: frozenset[str] = frozenset()  # names of sources that are for validation only
    validation_fraction: float = 0.02  # of the other sources' documents, by hash of source and group (or name)
    shard_bytes: int = 64_000_000  # bytes of text after which a new file is begun


@dataclass
class SourceReport:
    version: str
    license_place: str
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    left_out: dict[str, int] = field(default_factory=dict)  # documents by reason
    repeated_characters: int = 0


def build_corpus(
    settings: CorpusSettings, downloads: Downloads, note: Callable[[str], None]
) -> dict[str, SourceReport]:
    """Write FOLDER/{train,validation}/SOURCE-00000.jsonl.zst ..., LICENSES.txt and corpus.json; returns source reports.

    The folder appears whole or not at all, and replaces an older corpus. Packages stay in `downloads` in any case.
    Raises `DataError` with all sources that cannot be fetched, before anything else is written; also when the folder
    holds other files, is being written by another run, or when a split would be empty.
    """
    target = settings.folder
    _check_replaceable(target)
    prepare_output(downloads.folder / "downloads.json")
    with write_errors(DataError, downloads.folder, REMEDY):
        opened = fetch(settings.sources, downloads, note)
    work = partial_path(target)
    with write_errors(DataError, target, REMEDY), file_lock(target.with_name(target.name + ".lock"), 0) as held:
        if not held:
            raise DataError(f"{target}: another run is writing it. Wait for its end, or choose another folder.")
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir()
            reports = _write(settings, opened, work, note)
            _replace(work, target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return reports


def fetch(sources: Sequence[Source], downloads: Downloads, note: Callable[[str], None]) -> dict[str, Opened]:
    """All sources by name. Raises one `DataError` that names every source that cannot be fetched here, and why."""
    opened, missing = {}, {}
    for source in sources:
        started = time.monotonic()
        try:
            opened[source.name] = source.package.open(downloads)
        except UnavailableError as reason:
            missing[source.name] = str(reason)
        else:
            note(f"{source.name} {opened[source.name].version}: at hand after {time.monotonic() - started:.1f} s")
    if missing:
        lines = "".join(f"\n  {name}: {reason}" for name, reason in missing.items())
        remedy = f"go on without them: --sources {' '.join(opened)}" if opened else "none of the sources is left"
        raise DataError(
            f"{len(missing)} of {count_of(len(sources), 'source')} cannot be fetched here:{lines}\n"
            f"What was fetched is kept. Correct it and run again, or {remedy}"
        )
    return opened


def _check_replaceable(folder: Path) -> None:
    """DataError when files that are not a corpus's would be deleted with the older corpus or a killed run's remains."""
    prepare_output(folder / REPORT)
    for replaced in (folder, partial_path(folder), _older(folder)):
        names = {path.name for path in replaced.iterdir()} if replaced.is_dir() else set()
        if replaced == folder and names and REPORT not in names:
            raise DataError(
                f"{folder}: holds {min(names)!r} but no {REPORT}, so it is no corpus. Choose another folder."
            )
        if foreign := sorted(names - {REPORT, LICENSES, *SPLITS}):
            raise DataError(
                f"{replaced}: holds {foreign[0]!r}, which is of no corpus and would be deleted with it. Move it away, "
                "or choose another folder."
            )


def _older(folder: Path) -> Path:
    """Where the old corpus is kept until the new one has taken its place."""
    return folder.with_name(folder.name + ".older")


def _replace(work: Path, target: Path) -> None:
    older = _older(target)
    shutil.rmtree(older, ignore_errors=True)
    os.replace(target, older)
    os.replace(work, target)
    sync_folder(target.parent)
    shutil.rmtree(older)


def _write(
    settings: CorpusSettings, opened: Mapping[str, Opened], work: Path, note: Callable[[str], None]
) -> dict[str, SourceReport]:
    reports = {name: SourceReport(source.version, source.license_place) for name, source in opened.items()}
    split: dict[str, list[tuple[str, Document]]] = {name: [] for name in SPLITS}
    for name, source in opened.items():
        for document in _cleaned(source.documents, reports[name].left_out):
            split[_side(settings, name, document)].append((name, document))
    deduplicator = Deduplicator()
    with ExitStack() as stack:
        writers: dict[tuple[str, str], ShardWriter] = {}
        for side in SPLITS:
            (work / side).mkdir()
            for name, document in split[side]:
                report, before = reports[name], deduplicator.dropped_characters
                text = deduplicator.take(document.text)
                report.repeated_characters += deduplicator.dropped_characters - before
                if not text:
                    _count(report.left_out, "repeated")
                    continue
                if (side, name) not in writers:
                    writer = ShardWriter(work / side / name, settings.shard_bytes)
                    writers[side, name] = stack.enter_context(writer)
                report.documents[side] += 1
                report.bytes[side] += writers[side, name].add({"source": name, "name": document.name, "text": text})
    for side in SPLITS:
        if not any(report.documents[side] for report in reports.values()):
            raise DataError(f"{settings.folder}: no document for {side}. Take more sources or another fraction.")
    (work / LICENSES).write_text(_licenses(settings.sources, opened), encoding="utf-8")
    described = {name: asdict(report) for name, report in reports.items()}
    (work / REPORT).write_text(json.dumps({"sources": described}, indent=1) + "\n")
    for name, report in reports.items():
        note(_line(name, report))
    return reports


def _cleaned(documents: Iterable[Document], left_out: dict[str, int]) -> Iterator[Document]:
    for document in documents:
        text = clean(document.text)
        if len(text) < LEAST_CHARACTERS:
            _count(left_out, "short")
        elif not is_english(text):
            _count(left_out, "not English")
        else:
            yield Document(document.name, text, document.group)


def _count(left_out: dict[str, int], reason: str) -> None:
    left_out[reason] = left_out.get(reason, 0) + 1


def _side(settings: CorpusSettings, source: str, document: Document) -> str:
    key = f"{source}/{document.group or document.name}".encode()
    held_out = source in settings.held_out or is_held_out(key, settings.validation_fraction)
    return "validation" if held_out else "train"


def _line(name: str, report: SourceReport) -> str:
    sides = ", ".join(
        f"{side} {count_of(report.documents[side], 'document')} {report.bytes[side] / 1e6:.2f} MB"
        for side in reversed(SPLITS)
    )
    reasons = "".join(f", {count} {reason}" for reason, count in sorted(report.left_out.items()))
    return f"{name}: {sides}; left out: {report.repeated_characters / 1e6:.2f} MB repeated{reasons}"


def _licenses(sources: Sequence[Source], opened: Mapping[str, Opened]) -> str:
    rule = "=" * 100
    table = [
        f"{source.name}: {source.title}\n  from: {source.package.origin}, version {opened[source.name].version}\n"
        f"  licence: {source.license} ({source.terms})\n  its text below is from: {opened[source.name].license_place}\n"
        for source in sources
    ]
    texts = [f"{rule}\n{source.name}\n{rule}\n\n{opened[source.name].license_text}\n" for source in sources]
    return "What the files of this folder hold, and under which terms.\n\n" + "\n".join([*table, *texts])
