"""Print what opening a corpus costs against its size, on synthetic files that take no room on the disk."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tf.arguments import path, whole_number

if TYPE_CHECKING:
    from megatron_tf.data.opening import OpeningCost

HEADINGS = ("documents", "tokens", ".idx", "open", "memory", "a sample", "memory after samples")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--documents",
        nargs="+",
        type=whole_number(2 * 10**9),
        default=[10**6, 10**7, 10**8, 10**9],
        metavar="N",
        help="sizes to measure (default: a million to a billion)",
    )
    parser.add_argument(
        "--tokens-per-document", type=whole_number(10**6), default=300, metavar="N", help="default: 300"
    )
    parser.add_argument("--seq-length", type=whole_number(10**5), default=2048, metavar="N", help="default: 2048")
    parser.add_argument(
        "--folder", type=path, default=Path(tempfile.gettempdir()), help="for the files (default: %(default)s)"
    )
    return parser.parse_args()


def row(cost: OpeningCost) -> tuple[str, ...]:
    return (
        f"{cost.documents:.0e}",
        f"{cost.tokens:.0e}",
        f"{cost.index_bytes / 1e9:.2f} GB",
        f"{cost.open_seconds * 1e3:.1f} ms",
        f"{cost.open_bytes / 1e6:.1f} MB",
        f"{cost.sample_seconds * 1e6:.0f} us",
        f"{cost.sampled_bytes / 1e6:.1f} MB",
    )


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.data.opening import measure_opening

    for number, documents in enumerate(arguments.documents):
        cost = measure_opening(
            documents, arguments.tokens_per_document, arguments.seq_length, arguments.folder.absolute()
        )
        if number == 0:
            print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
        print("| " + " | ".join(row(cost)) + " |", flush=True)
