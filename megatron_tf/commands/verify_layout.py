"""Prove that a layout computes what one process computes: losses, gradient norms, and every gradient.

Trains the configured model on random tokens, in fp32, once on one process in plain PyTorch and once under the
configuration's layout (or every layout that fits), and prints how far they are apart. No data is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from megatron_tf.arguments import config_file, number, whole_number
from megatron_tf.config.load import load_config
from megatron_tf.config.validate import topology_for, validate
from megatron_tf.errors import ConfigError
from megatron_tf.parallel.topology import Topology

if TYPE_CHECKING:
    from megatron_tf.training.layout_check import Difference, Layout, Trace

MOST_RANKS = 256
count = whole_number(1_000_000)
tolerance = number(0, sys.float_info.max, "a number of 0 or more, such as 1e-5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=config_file, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.field=value",
                        help="replace values of the file")  # fmt: skip
    parser.add_argument("--ranks", type=number_of_ranks,
                        help="number of ranks; default: tensor × pipeline, or 2 when that is 1")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="every layout of 2 to --ranks ranks instead of one")
    parser.add_argument("--steps", type=count, default=20, help="optimizer steps (default 20)")
    parser.add_argument("--tolerance", type=tolerance, default=1e-5, help="largest relative error (default 1e-5)")
    arguments = parser.parse_intermixed_args()
    from megatron_tf.training.layout_check import Layout, compare, layouts, reference, run_layouts
    from megatron_tf.training.preflight import accelerator_problems, memory_problems, physical_memory

    config = load_config(arguments.config, [*arguments.overrides, "training.precision=fp32"])
    ranks = arguments.ranks or max(2, config.parallel.tensor * config.parallel.pipeline)
    if arguments.all:
        chosen = layouts(config, ranks)
        if not chosen:
            raise ConfigError(
                f"--ranks: no layout of 2 to {ranks} ranks fits this model and batch. Give more ranks, or another "
                "training.global_batch_size."
            )
    else:
        validate(config, ranks)
        chosen = [Layout(topology_for(config, ranks), config.parallel.sequence)]
    problems = list(accelerator_problems(os.environ))
    problems += memory_problems(Layout(Topology()).apply(config), 1, physical_memory())
    if problems:
        raise ConfigError(problems)
    expected = reference(config, arguments.steps)
    traces = run_layouts(config, chosen, arguments.steps)
    differences = [compare(trace, expected) for trace in traces]
    if not arguments.all:
        print_steps(traces[0], expected, chosen[0])
    print_table(chosen, differences, arguments.tolerance, arguments.steps)
    if not all(difference.agrees(arguments.tolerance) for difference in differences):
        sys.exit(1)


def number_of_ranks(text: str) -> int:
    """All of them run on this machine."""
    ranks = count(text)
    if ranks > MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{text} is more than the {MOST_RANKS} ranks that one machine is asked for")
    return ranks


def print_steps(trace: Trace, expected: Trace, layout: Layout) -> None:
    print(f"{'step':>4}  {'loss, one process':>17}  {str(layout):>22}  {'norm, one process':>17}  {str(layout):>22}")
    rows = zip(expected.losses, trace.losses, expected.grad_norms, trace.grad_norms)
    for step, (loss, other_loss, norm, other_norm) in enumerate(rows):
        print(f"{step:>4}  {loss:>17.8f}  {other_loss:>22.8f}  {norm:>17.8f}  {other_norm:>22.8f}")
    print()


def print_table(chosen: list[Layout], differences: list[Difference], tolerance: float, steps: int) -> None:
    print(
        f"worst relative error over {steps} steps against one process (gradients: first step); tolerance {tolerance:g}"
    )
    print(f"{'layout':<20}  {'loss':>8}  {'norm':>8}  {'gradient':>8}  verdict    of parameter")
    for layout, error in zip(chosen, differences):
        verdict = "agrees" if error.agrees(tolerance) else "DIFFERS"
        numbers = f"{error.loss:>8.1e}  {error.grad_norm:>8.1e}  {error.gradient:>8.1e}"
        print(f"{str(layout):<20}  {numbers}  {verdict:<9}  {error.parameter}")
