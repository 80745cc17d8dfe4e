"""Check this machine's GPU in at most 8 minutes: results against fp64, speeds, memory, and one rank of NCCL.

Needs a CUDA device, torch and triton, and what the package installs but deepspeed; no network. Writes report.md and
report.json into --output. Exit code 1 when a result is wrong or a part failed.
"""

from __future__ import annotations

import argparse
import json
import sys

from megatron_tf.arguments import path, whole_number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path, default="runs/gpu_check", metavar="DIR", help="default: runs/gpu_check")
    parser.add_argument(
        "--seconds", type=whole_number(86_400), default=330, help="after which no part begins (default 330)"
    )
    arguments = parser.parse_args()
    import torch

    from megatron_tf.benchmark import gpu_check
    from megatron_tf.benchmark.report import table
    from megatron_tf.durable import write_atomically
    from megatron_tf.errors import ConfigError, write_errors

    if not torch.cuda.is_available():
        raise ConfigError("gpu-check: no CUDA device is here. Run it on a machine with a GPU that torch can use.")
    device = torch.device("cuda")
    with write_errors(ConfigError, arguments.output, "Name another folder with --output."):
        arguments.output.mkdir(parents=True, exist_ok=True)
    done, sections = [], [f"# GPU check\n\n```\n{json.dumps(gpu_check.machine(device))}\n```\n"]
    for part in gpu_check.run(device, arguments.seconds):
        done.append(part)
        lines = [f"## {part.name} ({part.seconds:.0f} s)\n"]
        if part.rows:
            lines.append(f"```\n{table(part.rows)}\n```\n")
        if part.problem:
            lines.append(f"**{part.problem}**\n")
        sections.append("\n".join(lines))
        print(sections[-1], flush=True)
    with write_errors(ConfigError, arguments.output, "Name another folder with --output."):
        report = json.dumps(gpu_check.as_json(device, done), indent=2) + "\n"
        write_atomically(arguments.output / "report.json", report.encode())
        write_atomically(arguments.output / "report.md", "\n".join(sections).encode())
    print(f"written to {arguments.output}")
    if any(part.problem for part in done):
        sys.exit(1)
