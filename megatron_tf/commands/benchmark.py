"""Measure speed, memory and communication on this machine; each figure beside what it is to be compared with.

Times are medians of interleaved rounds, ratios medians of the rounds' own ratios. Runs on a CPU or one GPU, without
deepspeed. `tools/benchmark.py MODE --help` explains a mode.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from megatron_tf.architectures.tokenformer.section import TokenFormerModel
from megatron_tf.arguments import config_file, path, whole_number
from megatron_tf.benchmark import communication, memory, pattention, scaling, stages, step
from megatron_tf.benchmark.device import DTYPES, check_dtypes, machine, quick_dtype
from megatron_tf.benchmark.report import Row, check_json, table, write_json
from megatron_tf.config import load_config
from megatron_tf.config.validate import validate
from megatron_tf.errors import ConfigError
from megatron_tf.host_memory import keep_freed_memory, refuse_beyond_free

count, ranks = whole_number(1_000_000_000), whole_number(16)
scaled = whole_number(100_000_000)  # 4 times as many are of the ffn
CHAIN_TOKENS = (576, 2304, 2140, 8560, 4850, 8620)  # of the configurations of the paper's chain


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: no CUDA device is here. Give --device cpu.")
    check_dtypes(device, getattr(arguments, "dtypes", ()))
    if arguments.json:
        check_json(arguments.json)
    if device.type == "cpu":
        keep_freed_memory()  # as in training
        refuse_beyond_free()
    measured = measure(arguments, device)
    print(json.dumps(machine(device)))
    print(table(measured), flush=True)
    if arguments.json:
        write_json(arguments.json, arguments.mode, device, measured)


def measure(arguments: argparse.Namespace, device: torch.device) -> list[Row]:
    """All rows; as each is measured, a line on stderr."""
    measured: list[Row] = []
    try:
        for row in arguments.run(device, arguments):
            measured.append(row)
            print(f"{len(measured)}. " + "  ".join(map(str, list(row.values())[:4])), file=sys.stderr, flush=True)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
            raise ConfigError(
                f"row {len(measured) + 1} does not fit in the memory that is free: {str(error).splitlines()[0][:200]} "
                f"Give less of what {arguments.mode} --help lists: tokens, positions, samples, lengths or layers."
            ) from error
        raise
    return measured


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True, metavar="MODE")
    mode = add_mode(modes, "pattention", run_pattention, pattention.__doc__)
    mode.add_argument("--tokens", type=count, nargs="+", default=CHAIN_TOKENS, help="numbers of parameter tokens")
    mode.add_argument("--positions", type=count, default=2048, help="rows of the input (default 2048)")
    mode.add_argument("--width", type=count, default=768, help="hidden size (default 768)")
    add_timing(mode)
    mode = add_mode(modes, "stages", run_stages, stages.__doc__)
    mode.add_argument("--tokens", type=count, default=2304, help="number of parameter tokens (default 2304)")
    mode.add_argument("--positions", type=count, default=512, help="rows of the input (default 512)")
    mode.add_argument("--width", type=count, default=768, help="hidden size (default 768)")
    add_timing(mode)
    mode = add_mode(modes, "communication", run_communication, communication.__doc__)
    add_config(mode)
    mode.add_argument("--tensor", type=ranks, nargs="+", default=[2, 4], help="tensor ranks (default 2 4)")
    mode.set_defaults(device="cpu")
    mode = add_mode(modes, "memory", run_memory, memory.__doc__)
    add_config(mode)
    add_device(mode)
    mode = add_mode(modes, "step", run_step, step.__doc__)
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
    mode = add_mode(modes, "scaling", run_scaling, scaling.__doc__)
    mode.add_argument("config", type=config_file, metavar="CONFIG", help="the TokenFormer that is grown")
    mode.add_argument(
        "--tokens", type=scaled, nargs="*", default=(576, 2140, 4850, 8620), help="of q, k, v and proj each"
    )
    mode.add_argument("--lengths", type=count, nargs="*", default=(1024, 2048, 4096, 8192), help="of sequences")
    mode.add_argument("--positions", type=count, default=4096, help="positions of a batch (default 4096)")
    add_timing(mode)
    return parser.parse_args()


def add_config(mode: argparse.ArgumentParser) -> None:
    mode.add_argument("config", type=config_file, help="YAML file, see configs/")
    mode.add_argument("overrides", nargs="*", default=[], metavar="section.field=value",
                      help="replace values of the file; they come right after it")  # fmt: skip


def add_device(mode: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    mode.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")


def add_timing(mode: argparse.ArgumentParser) -> None:
    add_device(mode)
    mode.add_argument("--rounds", type=count, default=11, help="interleaved rounds (default 11)")
    quick = quick_dtype(torch.device(mode.get_default("device")))
    mode.add_argument("--dtypes", choices=DTYPES, nargs="+", default=[quick], help=f"default here: {quick}")


def add_mode(
    modes: argparse._SubParsersAction,
    name: str,
    run: Callable[[torch.device, argparse.Namespace], Iterable[Row]],
    description: str | None,
) -> argparse.ArgumentParser:
    """A sub-command whose `run` gives the rows of the table."""
    mode = modes.add_parser(name, description=description, help=(description or "").split("\n")[0])
    mode.set_defaults(run=run)
    mode.add_argument("--json", type=path, metavar="FILE", help="also write rows, machine and command as JSON")
    return mode


def run_pattention(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    return pattention.rows(device, dtypes, arguments.tokens, arguments.positions, arguments.width, arguments.rounds)


def run_stages(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    return stages.rows(device, dtypes, arguments.tokens, arguments.positions, arguments.width, arguments.rounds)


def run_communication(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    """The ranks are processes on CPUs and compile nothing, whatever the configuration: what is sent is the same."""
    if max(arguments.tensor) == 1:
        raise ConfigError("--tensor: one rank sends nothing. Give more ranks.")
    configs = []
    for tensor in arguments.tensor:
        for sequence in ("false", "true") if tensor > 1 else ("false",):
            layout = f"parallel.tensor={tensor}", f"parallel.sequence={sequence}", "parallel.pipeline=1"
            config = load_config(arguments.config, [*arguments.overrides, *layout, "training.compile=false"])
            validate(config, tensor)
            configs.append(config)
    return communication.rows(configs)


def run_memory(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    config = load_config(arguments.config, arguments.overrides)
    validate(config, 1)
    return memory.rows(device, config)


def run_step(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    names = [file.stem for file in arguments.configs]
    models = {
        file.stem if names.count(file.stem) == 1 else str(file): with_plain_formula(file, arguments.seq_length)
        for file in arguments.configs
    }
    for name in arguments.dtypes:
        yield from step.rows(
            models,
            step.Setting(
                device, DTYPES[name], arguments.samples, arguments.layers, arguments.compile, arguments.rounds
            ),
        )


def run_scaling(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    if not arguments.tokens and not arguments.lengths:
        raise ConfigError(
            "--tokens and --lengths: both are empty, so there is nothing to measure. Give one of them a value."
        )
    model = tokenformer_of(arguments.config)
    for name in arguments.dtypes:
        yield from scaling.rows(
            device, DTYPES[name], model, arguments.tokens, arguments.lengths, arguments.positions, arguments.rounds
        )


def tokenformer_of(file: Path) -> TokenFormerModel:
    if "=" in file.name and not file.exists():
        raise ConfigError(f"{file}: this mode takes files as they are. Write the value into a copy of the file.")
    model = load_config(file).model
    if not isinstance(model, TokenFormerModel):
        raise ConfigError(
            f"{file}: model.architecture {model.architecture} is what is compared with. Give a tokenformer."
        )
    return model


def with_plain_formula(file: Path, seq_length: int | None) -> TokenFormerModel:
    """The model of a configuration, with another sequence length if one is given."""
    model = tokenformer_of(file)
    if model.activation != "l2_norm_gelu":
        raise ConfigError(
            f"{file}: model.activation {model.activation} has no plain formula to be compared with. Give l2_norm_gelu."
        )
    return model if seq_length is None else model.model_copy(update={"seq_length": seq_length})
