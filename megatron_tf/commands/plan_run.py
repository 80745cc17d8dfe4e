"""What a run would need and cost, before anything is started: on a laptop, in a second, without torch.

Is the layout valid, does it fit, how long is a step, what does the run cost, how often to save, and which layouts would
be faster. For one run or a chain of growth stages, on any number of GPUs. Times are estimates; their assumptions are
printed with them. Exit code 2 when the configuration cannot run on so many GPUs; layouts that can are named all the
same.
"""

from __future__ import annotations

import argparse
import json

from megatron_tf.arguments import config_file, input_path, number, whole_number
from megatron_tf.config.stages import load_stages
from megatron_tf.costs.checkpoints import LLAMA_3_FAILURES_PER_GPU_YEAR
from megatron_tf.costs.hardware import GPUS, find_gpu
from megatron_tf.costs.law import ASSUMED_KAPPA, read_findings
from megatron_tf.costs.report import report
from megatron_tf.costs.summary import Circumstances, plan
from megatron_tf.errors import ConfigError

MOST_GPUS = 1_000_000
count = whole_number(MOST_GPUS)
bandwidth = number(1e-6, 1e6)
not_negative = number(0, 1e6)


def main() -> None:
    arguments = parse_arguments()
    gpu = find_gpu(arguments.gpu, per_node=arguments.gpus_per_node, network_gb_per_s=arguments.network_gb_per_s)
    overrides = list(arguments.overrides)
    if arguments.tokens is not None:
        overrides += [
            f"training.train_tokens={arguments.tokens}",
            "training.train_steps=null",
            "training.train_samples=null",
        ]
    configs = load_stages(arguments.config, overrides)
    if not gpu.fp8 and any(config.training.precision == "fp8" for config in configs):
        others = [name for name, other in GPUS.items() if other.fp8]
        raise ConfigError(
            f"training.precision: fp8 is not among the products of --gpu {gpu.name}. Set it to bf16, or choose among "
            f"{', '.join(others)}."
        )
    if arguments.tokens is not None and len(configs) > 1:
        raise ConfigError(
            f"--tokens: {arguments.config} is a chain of {len(configs)} stages. Give each stage its own: "
            "stages.NAME.training.train_tokens=..."
        )
    if arguments.scratch_tokens is not None and len(configs) == 1:
        raise ConfigError(f"--scratch-tokens: {arguments.config} is no chain. Give --tokens instead.")
    check_chain_options(arguments, len(configs))
    findings = None
    if arguments.study is not None:
        findings = read_findings(arguments.study, configs[0].model.architecture)
    circumstances = Circumstances(
        num_gpus=arguments.gpus,
        gpu=gpu,
        failures_per_gpu_year=arguments.failures_per_gpu_year,
        storage_bytes_per_second=arguments.storage_gb_per_s * 1e9,
        restart_seconds=arguments.restart_minutes * 60,
        num_best=arguments.best,
        scratch_tokens=arguments.scratch_tokens,
        findings=findings,
        kappa=None if arguments.kappa is None else (min(arguments.kappa), max(arguments.kappa)),
        budget=arguments.budget,
    )
    made = plan(configs, circumstances)
    print(json.dumps(made, indent=2) if arguments.json else report(made), flush=True)
    problems = made["problems"] + [
        f"stage {stage['name']}: {problem}" if len(configs) > 1 else problem
        for stage in made["stages"]
        for problem in stage["problems"]
    ]
    if problems:
        raise ConfigError(problems)


def check_chain_options(arguments: argparse.Namespace, num_stages: int) -> None:
    """ConfigError when an option is given without another that it needs, or without a chain."""
    for option in ("study", "kappa", "budget"):
        if getattr(arguments, option) is not None and num_stages == 1:
            raise ConfigError(f"--{option}: {arguments.config} is no chain. Give one with stages, or leave it out.")
    if arguments.budget is not None and arguments.study is None:
        raise ConfigError("--budget: what to do with it follows from a law. Give --study results.json as well.")
    if arguments.kappa is not None and arguments.scratch_tokens is not None:
        raise ConfigError("--kappa: follows from --scratch-tokens, which is given as well. Give one of the two.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=config_file, help="YAML file, see configs/; also one with stages")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.field=value", help="replace values of the file"
    )
    parser.add_argument("--gpus", type=count, required=True, metavar="N", help="number of GPUs")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"one of {', '.join(GPUS)} (default h100)")
    parser.add_argument("--gpus-per-node", type=count, metavar="N", help="default: 8")
    parser.add_argument(
        "--network-gb-per-s",
        type=bandwidth,
        metavar="X",
        help="bandwidth between nodes for each GPU, GB/s in each direction (default: its DGX's)",
    )
    parser.add_argument("--tokens", type=tokens, metavar="T", help="train on so many, such as 300e9")
    parser.add_argument(
        "--scratch-tokens",
        type=tokens,
        metavar="T",
        help="for a chain: what each size needs from scratch for the same loss (default: follows from --kappa)",
    )
    parser.add_argument(
        "--kappa",
        type=number(1e-3, 10),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="for a chain: tokens from scratch that a token before the growth is worth (default: as --study measured, "
        f"or {ASSUMED_KAPPA[0]:g} {ASSUMED_KAPPA[1]:g})",
    )
    parser.add_argument(
        "--study",
        type=input_path,
        metavar="FILE",
        help="for a chain: results.json of a study, whose fitted law says when to grow, and by how much",
    )
    parser.add_argument(
        "--budget", type=number(1, 1e40), metavar="FLOPS", help="for --study: to be spent (default: those of the chain)"
    )
    parser.add_argument(
        "--failures-per-gpu-year",
        type=not_negative,
        metavar="X",
        default=LLAMA_3_FAILURES_PER_GPU_YEAR,
        help="failures that end the run (default %(default).2f, as in Llama 3's pre-training)",
    )
    parser.add_argument(
        "--storage-gb-per-s",
        type=bandwidth,
        metavar="X",
        default=5.0,
        help="speed at which all ranks together write a checkpoint (default 5)",
    )
    parser.add_argument(
        "--restart-minutes",
        type=not_negative,
        metavar="X",
        default=10.0,
        help="from a failure to the first step afterwards (default 10)",
    )
    parser.add_argument("--best", type=count, default=5, metavar="K", help="layouts to name (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser.parse_intermixed_args()


def tokens(text: str) -> int:
    """A whole number of tokens, which may be written as 300e9."""
    return int(number(1, 1e18)(text))
