"""Prove that a run can change its layout: train under one, save, resume under another, and compare.

The configured model is trained on random tokens, in fp32, under every layout that fits and by both engines, saved in
the background, and resumed under another. For each change the table says how far the losses are from one process that
was never interrupted, and whether weights, both Adam moments and step counts were equal to the last bit after loading.
No data is needed.
"""

from __future__ import annotations

import argparse
import math
import sys
from itertools import product
from typing import TYPE_CHECKING

from megatron_tf.arguments import config_file
from megatron_tf.config.load import load_config
from megatron_tf.config.topology import Topology
from megatron_tf.config.validate import validate
from megatron_tf.errors import ConfigError
from megatron_tf.telemetry.text import count_of, table

if TYPE_CHECKING:
    from megatron_tf.verification.resume import Resumed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=config_file, help="YAML file, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="replace values of the file")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps before and after (default 10)")
    parser.add_argument("--ranks", type=int, default=4, help="largest number of ranks (default 4)")
    parser.add_argument(
        "--all", action="store_true", help="every change; by default each layout is left once and entered once"
    )
    parser.add_argument(
        "--engines", choices=("deepspeed", "torch", "both"), default="both", help="what trains (default both)"
    )
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative error (default 1e-5)")
    arguments = parser.parse_intermixed_args()
    for name in ("steps", "ranks"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name}: is {getattr(arguments, name)}, must be at least 1.")
    if not 0 <= arguments.tolerance < math.inf:
        raise ConfigError(f"--tolerance: is {arguments.tolerance}, must be a number of 0 or more, such as 1e-5.")
    config = load_config(arguments.config, ["training.precision=fp32", *arguments.overrides])
    from megatron_tf.engine.device import engine_problems
    from megatron_tf.verification.layout import Layout
    from megatron_tf.verification.resume import ENGINES, Setting, check_resumes, rotation, settings

    engines = ENGINES if arguments.engines == "both" else (arguments.engines,)
    alone = Layout(Topology(1, 1, 1))
    missing = [
        problem
        for engine in engines
        for problem in engine_problems(Setting(alone, engine=engine).apply(config), "--engines")
    ]
    if missing:
        raise ConfigError(missing)
    found = settings(config, arguments.ranks, engines)
    if not found:
        validate(alone.apply(config), 1)  # raises if the model itself is invalid
        raise ConfigError(f"no layout of 1 to {arguments.ranks} ranks fits this model and batch.")
    pairs = list(product(found, found)) if arguments.all else rotation(found)
    print(f"{len(found)} layouts, {len(pairs)} changes of layout", flush=True)
    results = check_resumes(config, pairs, arguments.steps)
    print_table(results, arguments.tolerance, arguments.steps)
    if not all(result.agrees(arguments.tolerance) for result in results):
        sys.exit(1)


def print_table(results: list[Resumed], tolerance: float, steps: int) -> None:
    print(
        f"{count_of(steps, 'step')}, saved, resumed for {steps} more; worst relative difference of a loss from one "
        "process"
    )
    print(
        f"that was not interrupted, tolerance {tolerance:g}; SP: sequence-parallel, Z0: without ZeRO, torch: by that "
        "engine"
    )
    rows = [("from", "to", "loss", "state loaded", "verdict")]
    for result in results:
        state = "bit-equal" if not result.differing else f"{len(result.differing)} differ"
        verdict = "agrees" if result.agrees(tolerance) else "DIFFERS"
        rows.append((str(result.before), str(result.after), f"{result.loss:.1e}", state, verdict))
    print(table(rows, to_left=(0, 1, 3, 4)))
    for result in results:
        for problem in result.differing:
            print(f"{result.before} → {result.after}: {problem}")
    equal = sum(not result.differing for result in results)
    print(f"{len(results)} changes: {equal} bit-equal, worst loss {max(result.loss for result in results):.1e}")
