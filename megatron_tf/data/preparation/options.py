"""The options that preparing text and preparing images have in common."""

from __future__ import annotations

import argparse

from megatron_tf.arguments import input_path, text_path, whole_number


def add_preparation_options(
    parser: argparse.ArgumentParser, *, metavar: str, inputs: str, things: str, bad: str, does: str
) -> None:
    """Adds the options for input and output, shared work, bad records, and data that are held out.

    The texts stand in the help. `metavar`, `inputs`: name and help of --input. `things`: what is prepared. `bad`: what
    ends the run or is left out. `does`: what the processes do, after "processes that".
    """
    add = parser.add_argument
    add("--input", type=input_path, nargs="+", required=True, metavar=metavar, help=inputs)
    add("--output-prefix", type=text_path, required=True, metavar="PREFIX", help="path of the output without suffix")
    add("--workers", type=whole_number(4096), default=1, metavar="N", help=f"processes that {does} (default: 1)")
    either = f"{bad} ends the run (default), or is named, counted and left out"
    add("--on-error", choices=("stop", "skip"), default="stop", help=either)
    split = f"hold out this share of the {things}, chosen by hash: writes PREFIX_train and PREFIX_validation"
    add("--validation-fraction", type=float, default=0.0, metavar="F", help=split)
    add("--shard-index", type=int, default=0, metavar="I", help="which share of the files this run does (default: 0)")
    add("--num-shards", type=int, default=1, metavar="N", help="number of runs that share the files (default: 1)")
    add("--replace", action="store_true", help="let go of other data under PREFIX, which otherwise is an error")
    add("--merge", action="store_true", help="only merge what all shards have written")
