"""Build a small corpus of real English without any download: this Python's documentation and its library's
docstrings."""

from __future__ import annotations

import argparse
import math
import platform
from itertools import chain

from megatron_tf.arguments import path
from megatron_tf.corpora.corpus import python_docstrings, python_topics, within_bytes, write_corpus
from megatron_tf.errors import DataError
from megatron_tf.telemetry.text import count_of


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "output_dir", type=path, help="folder for train.jsonl.zst, validation.jsonl.zst and LICENSE.txt"
    )
    parser.add_argument("--max-megabytes", type=float, default=8.0, metavar="M", help="most text to take (default: 8)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not 0 < arguments.max_megabytes < math.inf:
        raise DataError(f"--max-megabytes is {arguments.max_megabytes:g}. Choose a finite number above 0.")
    documents = within_bytes(chain(python_topics(), python_docstrings()), int(arguments.max_megabytes * 1e6))
    counts = write_corpus(documents, arguments.output_dir, platform.python_version())
    for split, (number, size) in counts.items():
        print(f"{arguments.output_dir / split}.jsonl.zst: {count_of(number, 'document')}, {size / 1e6:.2f} MB of text")
