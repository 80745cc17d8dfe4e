"""Measure speed, memory and communication on this machine; each figure beside what it is to be compared with.

Times are medians of interleaved rounds, ratios medians of the rounds' own ratios. Runs on a CPU or one GPU, without
deepspeed. `tools/benchmark.py MODE --help` explains a mode.
"""

from __future__ import annotations

if __name__ in ("__main__", "__mp_main__"):
    from megatron_tf.interrupt import end_quietly

    end_quietly()

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from megatron_tf.arguments import path, whole_number
from megatron_tf.benchmark import communication, memory, pattention, scaling, stages, step
from megatron_tf.benchmark.device import DTYPES, machine
from megatron_tf.benchmark.report import Row, check_json, table, write_json
from megatron_tf.config import load_config
from megatron_tf.config.schema import Model
from megatron_tf.config.validate import validate
from megatron_tf.errors import ConfigError, run_command
from megatron_tf.host_memory import keep_freed_memory

count, ranks = whole_number(1_000_000_000), whole_number(16)
CHAIN_TOKENS = (576, 2304, 2140, 8560, 4850, 8620)  # of the configurations of the paper's chain


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: no CUDA device is here. Give --device cpu.")
    if arguments.json:
        check_json(arguments.json)
    if device.type == "cpu":
        keep_freed_memory()  # as in training
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
    mode = add_mode(modes, "stages", run_stages, stages.__doc__)
    mode.add_argument("--tokens", type=count, default=2304, help="number of parameter tokens (default 2304)")
    mode.add_argument("--positions", type=count, default=512, help="rows of the input (default 512)")
    mode.add_argument("--width", type=count, default=768, help="hidden size (default 768)")
    mode.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["bf16", "fp32"], help="default: bf16 fp32")
    mode = add_mode(modes, "communication", run_communication, communication.__doc__)
    add_config(mode)
    mode.add_argument("--tensor", type=ranks, nargs="+", default=[1, 2, 4], help="tensor ranks (default 1 2 4)")
    mode = add_mode(modes, "memory", run_memory, memory.__doc__)
    add_config(mode)
    mode = add_mode(modes, "step", run_step, step.__doc__)
    mode.add_argument("configs", nargs="+", type=path, metavar="CONFIG", help="configurations of TokenFormers")
    mode.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["bf16"], help="default: bf16")
    mode.add_argument(
        "--layers",
        type=count,
        help="cut all models to this depth, their vocabulary in proportion (default: as configured)",
    )
    mode.add_argument("--samples", type=count, default=4, help="samples a step (default 4)")
    mode.add_argument("--seq-length", type=count, help="tokens a sample (default: as configured)")
    mode.add_argument("--compile", action="store_true", help="torch.compile of the blocks, but of the plain formula's")
    mode = add_mode(modes, "scaling", run_scaling, scaling.__doc__)
    mode.add_argument("config", type=path, metavar="CONFIG", help="the TokenFormer that is grown")
    mode.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    mode.add_argument(
        "--tokens", type=count, nargs="*", default=(576, 2140, 4850, 8620), help="of q, k, v and proj each"
    )
    mode.add_argument("--lengths", type=count, nargs="*", default=(1024, 2048, 4096, 8192), help="of sequences")
    mode.add_argument("--positions", type=count, default=4096, help="positions of a batch (default 4096)")
    return parser.parse_args()


def add_config(mode: argparse.ArgumentParser) -> None:
    mode.add_argument("config", type=path, help="YAML file, see configs/")
    mode.add_argument("overrides", nargs="*", default=[], metavar="section.field=value",
                      help="replace values of the file")  # fmt: skip


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
    mode.add_argument("--rounds", type=count, default=11, help="interleaved rounds (default 11)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    mode.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"default here: {default}")
    return mode


def run_pattention(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    return pattention.rows(device, dtypes, arguments.tokens, arguments.positions, arguments.width, arguments.rounds)


def run_stages(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    dtypes = [DTYPES[name] for name in arguments.dtypes]
    return stages.rows(device, dtypes, arguments.tokens, arguments.positions, arguments.width, arguments.rounds)


def run_communication(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    """The ranks are processes on CPUs, whatever the device: what is sent does not depend on it."""
    configs = []
    for tensor in arguments.tensor:
        for sequence in ("false", "true") if tensor > 1 else ("false",):
            layout = f"parallel.tensor={tensor}", f"parallel.sequence={sequence}", "parallel.pipeline=1"
            config = load_config(arguments.config, [*arguments.overrides, *layout])
            validate(config, tensor)
            configs.append(config)
    return communication.rows(configs)


def run_memory(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    config = load_config(arguments.config, arguments.overrides)
    validate(config, 1)
    return memory.rows(device, config)


def run_step(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    models = {file.stem: tokenformer_of(file, arguments.seq_length) for file in arguments.configs}
    for name in arguments.dtypes:
        yield from step.rows(
            models,
            step.Setting(
                device, DTYPES[name], arguments.samples, arguments.layers, arguments.compile, arguments.rounds
            ),
        )


def run_scaling(device: torch.device, arguments: argparse.Namespace) -> Iterable[Row]:
    return scaling.rows(
        device,
        DTYPES[arguments.dtype],
        tokenformer_of(arguments.config, None),
        arguments.tokens,
        arguments.lengths,
        arguments.positions,
        arguments.rounds,
    )


def tokenformer_of(file: Path, seq_length: int | None) -> Model:
    """The model of a configuration, with another sequence length if one is given."""
    model = load_config(file).model
    if model.architecture != "tokenformer" or model.activation != "l2_norm_gelu":
        raise ConfigError(
            f"{file}: model.architecture {model.architecture} with model.activation {model.activation} has no plain "
            "formula to be compared with. Give a tokenformer with l2_norm_gelu."
        )
    return model if seq_length is None else model.model_copy(update={"seq_length": seq_length})


if __name__ == "__main__":
    run_command(main)
