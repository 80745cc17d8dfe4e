"""Measure speed, memory and communication on this machine; each figure beside what it is to be compared with.

Times are medians of interleaved rounds, ratios medians of the rounds' own ratios. Runs on a CPU or one GPU, without
deepspeed. `tools/benchmark.py MODE --help` explains a mode.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from megatron_tf.arguments import whole_number
from megatron_tf.benchmark import pattention
from megatron_tf.benchmark.report import Row, machine, table, write_json
from megatron_tf.errors import ConfigError, run_command

count = whole_number(1_000_000_000)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHAIN_TOKENS = (576, 2304, 2140, 8560, 4850, 8620)  # of the configurations of the paper's chain


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: no CUDA device is here. Give --device cpu.")
    measured = list(arguments.run(device, arguments))
    print(json.dumps(machine(device)))
    print(table(measured), flush=True)
    if arguments.json:
        write_json(arguments.json, arguments.mode, device, measured)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    mode = add_mode(modes, "pattention", run_pattention, pattention.__doc__)
    mode.add_argument("--tokens", type=count, nargs="+", default=CHAIN_TOKENS, help="numbers of parameter tokens")
    mode.add_argument("--positions", type=count, default=2048, help="rows of the input (default 2048)")
    mode.add_argument("--width", type=count, default=768, help="hidden size (default 768)")
    mode.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["bf16", "fp32"], help="default: bf16 fp32")
    return parser.parse_args()


def add_mode(
    modes: argparse._SubParsersAction,
    name: str,
    run: Callable[[torch.device, argparse.Namespace], Iterable[Row]],
    description: str | None,
) -> argparse.ArgumentParser:
    """A sub-command whose `run` gives the rows of the table."""
    mode = modes.add_parser(name, description=description, help=(description or "").split("\n")[0])
    mode.set_defaults(run=run)
    mode.add_argument("--json", type=Path, metavar="FILE", help="also write rows, machine and command as JSON")
    mode.add_argument("--rounds", type=count, default=11, help="interleaved rounds (default 11)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    mode.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")
    return mode


def run_pattention(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    return pattention.rows(device, dtypes, arguments.tokens, arguments.positions, arguments.width, arguments.rounds)


if __name__ == "__main__":
    run_command(main)
