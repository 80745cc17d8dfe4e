"""Draw loss against tokens or steps, of one run or of several: a run and those that were grown from it, in order."""

from __future__ import annotations

import argparse

from megatron_tf.arguments import path
from megatron_tf.telemetry.plot import plot_runs, read_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN_DIR", help="folders of runs, oldest first")
    parser.add_argument("--output", type=path, required=True, metavar="FILE", help="the picture: .png, .pdf, .svg ...")
    parser.add_argument("--x", choices=("tokens", "steps", "flops"), default="tokens", help="default: tokens")
    arguments = parser.parse_args()
    plot_runs([read_run(folder) for folder in arguments.runs], arguments.output, arguments.x)
    print(arguments.output)
