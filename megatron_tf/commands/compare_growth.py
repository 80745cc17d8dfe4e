"""Compare growth methods with each other and with the bigger model from scratch, on the same tokens.

Trains CONFIG's smaller model, grows it by each method and trains on, and trains the bigger model from the start on as
many tokens as both stages together; each with every seed. Runs that are there already are not repeated, and one that was
cut off goes on. Prints a table and draws loss against tokens and against floating-point operations.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tf.arguments import config_file, path, whole_number
from megatron_tf.config.load import load_config
from megatron_tf.config.machine import machine_problems
from megatron_tf.config.schema import Growth, RunConfig
from megatron_tf.config.validate import validate
from megatron_tf.errors import ConfigError, UserError
from megatron_tf.growth.methods import METHODS
from megatron_tf.growth.rules import chain_problems, growth_problems
from megatron_tf.paths import literal
from megatron_tf.telemetry import text
from megatron_tf.telemetry.plot import RunCurve, plot_groups, read_run

SCRATCH = "from scratch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=config_file, default="tiny", metavar="FILE",
                        help="the smaller model's run")  # fmt: skip
    parser.add_argument("--big", type=config_file, default="tiny_grow", metavar="FILE",
                        help="the run that grows it")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="METHOD",
                        help=f"of {', '.join(METHODS)} (default: all)")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=whole_number(2**31, least=0), default=[1, 2], metavar="SEED")
    parser.add_argument("--ranks", type=whole_number(256), default=2, help="processes to train on (default 2)")
    parser.add_argument("--output", type=path, default="runs/compare_growth", metavar="DIR")
    arguments = parser.parse_args()
    small, big = load_config(arguments.small), load_config(arguments.big)
    check(arguments, small, big)

    groups: dict[str, list[list[RunCurve]]] = {name: [] for name in (*arguments.methods, SCRATCH)}
    for seed in arguments.seeds:
        out = arguments.output / f"seed{seed}"
        start = run(arguments.small, arguments.ranks, out / "small", seed, [])
        for method in arguments.methods:
            grown = [f"growth.from={literal(str(out / 'small'))}", f"growth.method={method}"]
            groups[method].append([start, run(arguments.big, arguments.ranks, out / method, seed, grown)])
        assert small.training.train_steps is not None and big.training.train_steps is not None
        steps = small.training.train_steps * batch(small) // batch(big) + big.training.train_steps
        scratch = ["growth=null", f"training.train_steps={steps}"]
        groups[SCRATCH].append([run(arguments.big, arguments.ranks, out / "scratch", seed, scratch)])
    print("\n" + table(groups))
    picture = arguments.output / "loss.png"
    plot_groups(groups, picture)
    print(f"\n{picture}")


def check(arguments: argparse.Namespace, small: RunConfig, big: RunConfig) -> None:
    """ConfigError with all that would stop one of the runs, before the first of them begins."""
    problems = []
    for name in ("methods", "seeds"):
        values = getattr(arguments, name)
        if repeated := [value for value in values if values.count(value) > 1]:
            problems.append(f"--{name}: {repeated[0]} is there twice, and one run would count as two. Give it once.")
    for name, config in (("small", small), ("big", big)):
        try:
            validate(config, arguments.ranks)
        except ConfigError as error:
            problems += [f"--{name}: {problem}" for problem in error.problems]
        problems += [f"--{name}: {problem}" for problem in machine_problems(config)]
        if config.training.train_steps is None:
            problems.append(f"--{name}: training.train_steps must be given, because the steps of both are added up.")
        if not config.data.validation:
            problems.append(f"--{name}: data.validation is empty, and losses on it are what is compared. Name some.")
    if found := growth_problems(small.model, big.model):
        problems += [f"--big: {problem}" for problem in found]
    else:
        problems += [f"--methods {method}: {problem}" for method in arguments.methods for problem in
                     growth_by(method, small, big)]  # fmt: skip
    if file := next((f for f in (arguments.output, *arguments.output.parents) if f.exists() and not f.is_dir()), None):
        problems.append(f"--output: {file} is a file. Give a folder.")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def growth_by(method: str, small: RunConfig, big: RunConfig) -> list[str]:
    """Why `method` cannot grow the smaller model into the bigger one."""
    growth = Growth.model_validate({"from": literal(small.run.dir), "method": method})
    return chain_problems([small, big.model_copy(update={"growth": growth})])


def batch(config: RunConfig) -> int:
    """Tokens a step."""
    return config.training.global_batch_size * config.model.seq_length


def run(config: Path, ranks: int, folder: Path, seed: int, overrides: list[str]) -> RunCurve:
    """Trains what is not trained yet, and reads what it logged."""
    launcher = str(Path(sys.executable).with_name("torchrun"))
    words = [launcher, "--standalone", "--nproc-per-node", str(ranks), "-m", "megatron_tf", "train", str(config)]
    words += [f"run.dir={literal(str(folder))}", f"run.seed={seed}", *overrides]
    print("\n$ " + " ".join(["torchrun", *words[1:]]), flush=True)
    if code := subprocess.run(words).returncode:
        raise UserError(
            f"this command ended with exit code {code}, its message is above: {' '.join(words)}\n"
            "Correct it and start this comparison again: what is trained is kept, and a run that was cut off goes on."
        )
    return read_run(folder)


def table(groups: dict[str, list[list[RunCurve]]]) -> str:
    """Validation loss of each group just before and after growth and at the end: the mean, and each seed's."""
    rows = [("", "tokens", "FLOPs", "before", "after", "end", "end, by seed")]
    for name, members in groups.items():
        evaluations = [[evaluated(run) for run in chain] for chain in members]
        last = evaluations[0][-1][-1]
        before = mean([chain[0][-1] for chain in evaluations]) if len(evaluations[0]) == 2 else "-"
        after = mean([chain[1][0] for chain in evaluations]) if len(evaluations[0]) == 2 else "-"
        ends = [chain[-1][-1] for chain in evaluations]
        seeds = ", ".join(f"{record['eval/loss']:.4f}" for record in ends)
        rows.append((name, f"{last['tokens']:,}", f"{last['flops']:.2e}", before, after, mean(ends), seeds))
    return text.table(rows, to_left=(0, 6))


def evaluated(run: RunCurve) -> list[dict]:
    return [record for record in run.records if record.get("eval/loss") is not None]


def mean(records: Sequence[dict]) -> str:
    return f"{sum(record['eval/loss'] for record in records) / len(records):.4f}"
