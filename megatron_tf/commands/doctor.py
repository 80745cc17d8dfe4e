"""What is installed here, what is missing and what it would enable; and, in a job, who is slow or broken.

    python tools/doctor.py                                     this machine
    torchrun --nproc-per-node 8 tools/doctor.py                also every device, link and collective of a job;
    srun python tools/doctor.py                                the same under srun and deepspeed

Exit code 0; 1 when something is broken (with --fail-on-slow also when something is slow); 2 for a mistake in starting
it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_tf.arguments import number
from megatron_tf.diagnosis.installation import installed_packages, machine_warnings, system_facts
from megatron_tf.diagnosis.report import job_report, machine_report
from megatron_tf.runtime.environment import LaunchEnvironment, detect, one_message
from megatron_tf.runtime.network import interface_problems

if TYPE_CHECKING:
    from megatron_tf.runtime.rendezvous import Assembly


def main() -> None:
    arguments = parse_arguments()
    environment = detect(os.environ)
    report: dict[str, Any] = {}
    is_main = environment.rank == 0
    if is_main:
        report = this_machine()
        if not arguments.json:
            print(machine_report(report), flush=True)
    broken = bool(report.get("broken"))
    slow = False
    if environment.world_size > 1 and not broken:
        with one_message(environment):
            code = the_job(arguments, environment, report)
    else:
        if is_main and environment.world_size == 1 and not arguments.json:
            print("\nStart it under torchrun, srun or deepspeed to test the ranks of a job.")
        code = exit_code(arguments, broken, slow)
    if is_main and arguments.json:
        print(json.dumps(report, indent=2))
    sys.exit(code)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes",
        type=number(0.001, 100_000),
        metavar="X",
        help="size of large messages (default 256 between GPUs, 4 between CPUs)",
    )
    parser.add_argument(
        "--timeout-seconds",
        type=number(1, 86_400),
        default=60.0,
        metavar="X",
        help="how long ranks wait for each other in each test (default 60)",
    )
    parser.add_argument(
        "--slow-factor",
        type=number(1, 1e6),
        metavar="X",
        help="how many times slower than the median is slow (default 1.5 on GPUs, 3 on CPUs)",
    )
    parser.add_argument("--fail-on-slow", action="store_true", help="exit code 1 also for what is slow")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args()


def exit_code(arguments: argparse.Namespace, broken: bool, slow: bool) -> int:
    return int(broken or (slow and arguments.fail_on_slow))


def this_machine() -> dict[str, Any]:
    """Software and devices of this machine, and their problems, as JSON values."""
    packages = installed_packages()
    facts = list(system_facts())
    broken = [p.problem for p in packages if p.problem and p.package.essential]
    lacking = [p.problem for p in packages if p.problem and not p.package.essential]
    gpus: list[str] = []
    if not any(p.package.name == "torch" and p.version is None for p in packages):
        try:
            gpus = devices()
        except (ImportError, OSError, RuntimeError) as error:
            broken.append(f"torch cannot be used: {type(error).__name__}: {error}")
    warnings = [*machine_warnings(len(gpus)), *interface_problems(os.environ, (), on_gpu=bool(gpus))]
    return {
        "system": dict(facts),
        "packages": {p.package.name: p.version for p in packages},
        "gpus": gpus,
        "missing": lacking,
        "warnings": warnings,
        "broken": broken,
    }


def devices() -> list[str]:
    """One description of each GPU."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB (CUDA {torch.version.cuda})" for gpu in found]


def the_job(arguments: argparse.Namespace, environment: LaunchEnvironment, report: dict[str, Any]) -> int:
    """Tests all ranks; rank 0 prints the findings. Returns the exit code, the same on every rank that is not broken."""
    import torch

    from megatron_tf.diagnosis.job import examine
    from megatron_tf.runtime.rendezvous import Assembly, open_store

    store = open_store(environment, arguments.timeout_seconds)
    assembly = Assembly(store, environment.rank, environment.world_size, arguments.timeout_seconds)
    size = arguments.megabytes or (256 if torch.cuda.is_available() else 4)
    is_main = environment.rank == 0
    prints = is_main and not arguments.json

    def say(text: str) -> None:
        if prints:
            print(f"... {text}", flush=True)

    given = {name: value for name, value in vars(arguments).items() if value is not None and name != "local_rank"}
    options = {f"--{name.replace('_', '-')}": str(value) for name, value in given.items()}
    found = examine(
        assembly, store, environment.local_rank, int(size * 1e6), arguments.slow_factor, say, environment.run, options
    )
    if not is_main:
        return listen(assembly, environment, found.broken)
    report["job"] = asdict(found)
    if prints:
        print(job_report(report["job"]), flush=True)
    code = exit_code(arguments, bool(found.broken), bool(found.slow))
    assembly.tell(code)
    return code


def listen(assembly: Assembly, environment: LaunchEnvironment, known: list[str]) -> int:
    """The exit code that rank 0 sends. If rank 0 is the broken one: 1, and up to two ranks of each node print `known`,
    the problems that they have found."""
    code = assembly.hear()
    if code is None and environment.local_rank < 2:
        for sentence in known or [f"{assembly.name(0)} does not answer"]:
            print(f"BROKEN, says {assembly.name(assembly.rank)}: {sentence}", file=sys.stderr)
    return 1 if code is None else code
