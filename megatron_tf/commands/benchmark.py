"""Measure speed, memory and communication on this machine; each figure next to what it is compared with.

Times are medians of interleaved rounds, ratios medians of the rounds' own ratios. Runs on a CPU or one GPU, without
deepspeed. `megatron_tf benchmark MODE --help` explains a mode.
"""

from __future__ import annotations

import argparse
import ast
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from megatron_tf.arguments import config_file, path, whole_number
from megatron_tf.config.sections.training import ComputeType

count, ranks = whole_number(1_000_000_000), whole_number(16)
scaled = whole_number(100_000_000)  # 4 times as many are of the ffn
CHAIN_TOKENS = (576, 2304, 2140, 8560, 4850, 8620)  # of the configurations of the paper's chain


def main() -> None:
    arguments = parse_arguments()
    from megatron_tf.benchmark.modes import run_benchmark

    run_benchmark(arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    mode = add_mode(modes, "pattention")
    mode.add_argument("--tokens", type=count, nargs="+", default=CHAIN_TOKENS, help="numbers of parameter tokens")
    mode.add_argument("--positions", type=count, default=2048, help="rows of the input (default 2048)")
    mode.add_argument("--width", type=count, default=768, help="hidden size (default 768)")
    add_timing(mode)
    mode = add_mode(modes, "sparse")
    mode.add_argument("--tokens", type=count, nargs="+", default=(2304, 8560), help="parameter tokens that are used")
    mode.add_argument("--candidates", type=count, nargs="+", default=(4, 16), help="groups of tokens in each slot")
    mode.add_argument("--group-size", type=count, default=256, help="tokens of a candidate (default 256)")
    mode.add_argument("--positions", type=count, default=8192, help="rows of the input (default 8192)")
    mode.add_argument("--width", type=count, default=768, help="hidden size (default 768)")
    add_timing(mode)
    mode = add_mode(modes, "stages")
    mode.add_argument("--tokens", type=count, default=2304, help="number of parameter tokens (default 2304)")
    mode.add_argument("--positions", type=count, default=512, help="rows of the input (default 512)")
    mode.add_argument("--width", type=count, default=768, help="hidden size (default 768)")
    add_timing(mode)
    mode = add_mode(modes, "communication")
    add_config(mode)
    mode.add_argument("--tensor", type=ranks, nargs="+", default=[2, 4], help="tensor ranks (default 2 4)")
    mode.set_defaults(device="cpu")
    mode = add_mode(modes, "context")
    add_config(mode)
    mode.add_argument("--ranks", type=ranks, nargs="+", default=[1, 4], help="context ranks (default 1 4)")
    mode.set_defaults(device="cpu")
    mode = add_mode(modes, "engines")
    add_config(mode)
    mode.add_argument("--rounds", type=count, default=11, help="interleaved rounds (default 11)")
    mode.set_defaults(device="cpu")
    mode = add_mode(modes, "memory")
    add_config(mode)
    add_device(mode)
    mode = add_mode(modes, "step")
    mode.add_argument("configs", nargs="+", type=config_file, metavar="CONFIG", help="configurations of TokenFormers")
    mode.add_argument(
        "--layers",
        type=count,
        help="cut all models to this depth, their vocabulary in proportion (default: as configured)",
    )
    mode.add_argument("--samples", type=count, default=4, help="samples a step (default 4)")
    mode.add_argument("--seq-length", type=count, help="tokens a sample (default: as configured)")
    mode.add_argument("--compile", action="store_true", help="torch.compile of the blocks, but of the plain formula's")
    add_timing(mode)
    mode = add_mode(modes, "scaling")
    mode.add_argument("config", type=config_file, metavar="CONFIG", help="the TokenFormer that is grown")
    mode.add_argument(
        "--tokens", type=scaled, nargs="*", default=(576, 2140, 4850, 8620), help="of q, k, v and proj each"
    )
    mode.add_argument("--lengths", type=count, nargs="*", default=(1024, 2048, 4096, 8192), help="of sequences")
    mode.add_argument("--positions", type=count, default=4096, help="positions of a batch (default 4096)")
    add_timing(mode)
    mode = add_mode(modes, "adapters")
    mode.add_argument("--layers", type=count, default=4, help="of the base (default 4)")
    mode.add_argument("--width", type=count, default=768, help="hidden size of the base (default 768)")
    mode.add_argument("--samples", type=count, default=2, help="samples a step (default 2)")
    mode.add_argument("--positions", type=count, default=256, help="tokens a sample (default 256)")
    mode.add_argument("--rank", type=count, default=8, help="of LoRA (default 8)")
    mode.add_argument("--rounds", type=count, default=11, help="interleaved rounds (default 11)")
    add_device(mode)
    mode = add_mode(modes, "serving")
    mode.add_argument("config", type=config_file, metavar="CONFIG", help="a TokenFormer that models language")
    mode.add_argument("--layers", type=count, default=2, help="of each model (default 2)")
    mode.add_argument("--positions", type=count, default=512, help="of the prompt (default 512)")
    add_timing(mode)
    mode = add_mode(modes, "images")
    mode.add_argument("config", type=config_file, metavar="CONFIG", help="a TokenFormer that classifies images")
    mode.add_argument("--layers", type=count, default=2, help="of each model (default 2)")
    mode.add_argument("--samples", type=count, default=8, help="images a step (default 8)")
    mode.add_argument("--workers", type=ranks, default=1, help="threads of the loader (default 1)")
    mode.add_argument("--rounds", type=count, default=11, help="interleaved rounds (default 11)")
    add_device(mode)
    return parser.parse_args()


def add_config(mode: argparse.ArgumentParser) -> None:
    mode.add_argument("config", type=config_file, help="YAML file, see configs/")
    mode.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.field=value",
        help="replace values of the file; they come right after it",
    )


def add_device(mode: argparse.ArgumentParser) -> None:
    mode.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def add_timing(mode: argparse.ArgumentParser) -> None:
    add_device(mode)
    mode.add_argument("--rounds", type=count, default=11, help="interleaved rounds (default 11)")
    mode.add_argument(
        "--dtypes",
        choices=get_args(ComputeType),
        nargs="+",
        help="default: bf16 where the device has instructions for it, else fp32",
    )


def add_mode(modes: argparse._SubParsersAction, name: str) -> argparse.ArgumentParser:
    """Adds a sub-command. Its help is the docstring of its module in megatron_tf/benchmark."""
    description = docstring(f"megatron_tf.benchmark.{name}")
    mode = modes.add_parser(name, description=description, help=description.split("\n")[0])
    mode.add_argument("--json", type=path, metavar="FILE", help="also write rows, machine and command as JSON")
    return mode


def docstring(module: str) -> str:
    """The docstring of a module, read without importing it: that would import torch and make --help slow."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
