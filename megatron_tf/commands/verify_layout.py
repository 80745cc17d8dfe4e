"""Prove that a layout computes what one process computes: losses, norms, every gradient, an evaluation.

Trains the configured model on random tokens, in fp64 on one process in plain PyTorch and in fp32 under the
configuration's layout (or every layout that fits), and prints how far they are apart, and how far rounding may take
them. That is found out by training on one process in fp32 too, twice. No data is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from megatron_tf.arguments import config_file, number, whole_number
from megatron_tf.config.architectures import architecture_of
from megatron_tf.config.load import load_config
from megatron_tf.config.run_plan import topology_for
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.errors import ConfigError
from megatron_tf.telemetry.text import count_of, table

if TYPE_CHECKING:
    from megatron_tf.verification.layout import Layout, Trace
    from megatron_tf.verification.rounding import Verdict

MOST_RANKS = 256
# Engines train in fp32 at most, so no run of a layout in fp64 can decide it.
OF_CANDIDATES = (
    "The model has candidates (model.sparse). Where two of them differ only by rounding, a layout may choose the other "
    "one, and all that follows differs, which is no fault. A fault differs with every seed: repeat it with run.seed=1, "
    "2 and 3. In few steps (--steps 2) fewer choices are close."
)
count = whole_number(1_000_000)
tolerance = number(0, sys.float_info.max, "a number of 0 or more, such as 1e-5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=config_file, help="YAML file, see configs/")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.field=value", help="replace values of the file"
    )
    parser.add_argument(
        "--ranks", type=number_of_ranks, help="number of ranks; default: what the layout needs, or 2 when that is 1"
    )
    parser.add_argument("--all", action="store_true", help="every layout of 2 to --ranks ranks instead of one")
    parser.add_argument("--steps", type=count, default=20, help="optimizer steps (default 20)")
    parser.add_argument("--tolerance", type=tolerance, help="largest relative error; default: what rounding explains")
    arguments = parser.parse_intermixed_args()
    from megatron_tf.engine.device import accelerator_problems, engine_problems
    from megatron_tf.training.preflight import memory_problems, physical_memory
    from megatron_tf.verification.layout import Layout, layouts, run_layouts
    from megatron_tf.verification.rounding import equal_limits, exact_and_limits, judge

    config = load_config(arguments.config, [*arguments.overrides, "training.precision=fp32"])
    ranks = arguments.ranks or max(2, config.parallel.ranks_per_sample)
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
    problems = [*accelerator_problems(os.environ), *engine_problems(config)]
    problems += [
        f"{problem} Half of the machine's memory is counted, because the check trains in fp64 as well."
        for problem in memory_problems(Layout(Topology()).apply(config), 1, physical_memory() // 2)
    ]
    if problems:
        raise ConfigError(problems)
    exact, limits = exact_and_limits(config, arguments.steps)
    if arguments.tolerance is not None:
        limits = equal_limits(exact, arguments.tolerance)
    traces = run_layouts(config, chosen, arguments.steps)
    verdicts = [judge(trace, exact, limits) for trace in traces]
    if not arguments.all:
        print_steps(traces[0], exact, chosen[0])
    print_table(chosen, verdicts, arguments.steps)
    if not all(verdict.agrees for verdict in verdicts):
        if architecture_of(config.model).sparse_sections(config.model):
            print(OF_CANDIDATES)
        sys.exit(1)


def number_of_ranks(text: str) -> int:
    """A parser for the number of ranks. It has a limit because all of them run on this machine."""
    ranks = count(text)
    if ranks > MOST_RANKS:
        raise argparse.ArgumentTypeError(f"{text} is more than the {MOST_RANKS} ranks that one machine is asked for")
    return ranks


def print_steps(trace: Trace, expected: Trace, layout: Layout) -> None:
    values = zip(expected.losses, trace.losses, expected.grad_norms, trace.grad_norms)
    rows: list[tuple[str, ...]] = [("step", "loss, one process", str(layout), "norm, one process", str(layout))]
    rows += [(str(step), *(f"{value:.8f}" for value in of_step)) for step, of_step in enumerate(values)]
    print(table(rows, to_left=()) + "\n")


def print_table(chosen: list[Layout], verdicts: list[Verdict], steps: int) -> None:
    """Prints, for each layout and kind of value, the relative error that is nearest to its limit."""
    print(
        f"relative errors over {count_of(steps, 'step')} against one process in fp64, and their limits "
        "(gradients: first step; validation: after the last)"
    )
    rows: list[tuple[str, ...]] = [
        (
            "layout",
            "loss",
            "limit",
            "norm",
            "limit",
            "gradient",
            "limit",
            "validation",
            "limit",
            "verdict",
            "of parameter",
        )
    ]
    for layout, verdict in zip(chosen, verdicts):
        word = "agrees" if verdict.agrees else "DIFFERS"
        errors = (verdict.loss, verdict.grad_norm, verdict.gradient, verdict.validation)
        numbers = [f"{number:.1e}" for error in errors for number in (error.value, error.limit)]
        rows.append((str(layout), *numbers, word, verdict.parameter))
    print(table(rows, to_left=(0, 9, 10)))
