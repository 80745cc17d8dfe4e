"""Many runs that answer one question: arms in a file, what they start from, seeds and sweeps.

`plan` shows the runs, their order, their cost and, where speeds are known, how long they take. `run` works through
them and goes on where it was stopped; any number of tasks of a SLURM array may share one study. `report` writes
results.json, a table and a picture of what has ended. Studies that come with megatron_tf are in experiments/, and are
found by their names.
"""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from megatron_tf.arguments import number, path, study_file, whole_number
from megatron_tf.config.machine import machine_problems
from megatron_tf.durable import check_writable
from megatron_tf.errors import ConfigError, UserError, raise_if_any
from megatron_tf.study.comparable import check_comparable
from megatron_tf.study.file import Study, load_study
from megatron_tf.study.plan import Node, Plan, make_plan
from megatron_tf.telemetry import text
from megatron_tf.telemetry.meters import format_duration

MODES = ("plan", "run", "report")
OPTIONS = {
    "workers": ("plan", "run"),
    "probe": ("plan", "report"),
    "flops_per_second": ("plan",),
    "task": ("run",),
    "output": ("report",),
}


def main() -> None:
    arguments = parse_arguments()
    study = load_study(arguments.study, arguments.overrides)
    # Check the file first, whichever runs have ended.
    check_comparable(make_plan(study))
    if arguments.mode == "plan":
        show_plan(study, arguments)
    elif arguments.mode == "run":
        run_study(study, arguments)
    else:
        show_report(study, arguments.output, arguments.probe)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES, help="what to do")
    parser.add_argument("study", type=study_file, help="YAML file, or the name of a study that comes with megatron_tf")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="replace keys of the top level")
    parser.add_argument(
        "--workers",
        type=whole_number(4096),
        metavar="N",
        help="plan, run: runs at once (default: as many as cores, or GPUs, allow). With more than GPUs, runs of one "
        "process share them",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="plan, report: measure the speed of each model with its optimizer, in turns, in this process",
    )
    parser.add_argument(
        "--flops-per-second", type=number(1, 1e20), metavar="X", help="plan: of the machine that it will run on"
    )
    parser.add_argument(
        "--task",
        type=whole_number(10**6, least=0),
        metavar="N",
        help="run: this process is one of several; begin its lines with this number",
    )
    parser.add_argument(
        "--output", type=path, metavar="DIR", help="report: where to (default: the folder of the study)"
    )
    arguments = parser.parse_intermixed_args()
    for name, modes in OPTIONS.items():
        if arguments.mode not in modes and getattr(arguments, name) not in (None, False):
            parser.error(f"--{name.replace('_', '-')} is for {' and '.join(modes)}, not for {arguments.mode}")
    return arguments


def known_plan(study: Study) -> Plan:
    """The plan of `study`, given the runs that have ended. ConfigError when a run has begun with another configuration
    than the file gives now."""
    from megatron_tf.study.result import check_unchanged, loss_of

    plan = make_plan(study, loss_of)
    check_unchanged(plan)
    return plan


def show_plan(study: Study, arguments: argparse.Namespace) -> None:
    from megatron_tf.study.hours import Speeds, measured, total_seconds
    from megatron_tf.study.machine import room_for, threads
    from megatron_tf.study.probe import probe
    from megatron_tf.study.result import has_ended

    plan = known_plan(study)
    check_data(plan)
    workers = arguments.workers or room_for(study.ranks)
    if arguments.flops_per_second is not None:
        speeds = Speeds({}, arguments.flops_per_second)
    else:
        speeds = probe(plan.nodes, study.ranks, threads(study.ranks, workers)) if arguments.probe else measured(plan)
    rows = [("run", "starts from", "parameters", "own tokens", "own FLOPs", "FLOPs", "time", "")]
    for node in plan.nodes:
        seconds = speeds.seconds(node)
        origin = "" if node.parent is None else f"{node.arm.by} of {node.parent.name}"
        state = state_of(node, study)
        rows.append(
            (
                node.name,
                origin,
                f"{node.parameters:,}",
                f"{node.own_tokens:,}",
                f"{node.own_flops:.2e}",
                f"{node.end.flops:.2e}",
                "?" if seconds is None else format_duration(seconds),
                state,
            )
        )
    print(text.table(rows, to_left=(0, 1, 7)))
    left = [node for node in plan.nodes if not has_ended(node)]
    flops = sum(node.own_flops for node in left)
    print(f"\n{text.count_of(len(plan.nodes), 'run')}, {len(left)} of them left: {flops:.2e} FLOPs")
    total = total_seconds(plan, workers, speeds.seconds)
    if total is None:
        print("time: not known. Give --probe, or --flops-per-second")
    else:
        print(f"time: about {format_duration(total)} with {workers} at once, without start-up and evaluation")
    problems = missing(plan)
    for problem in problems:
        print(f"warning: {problem}")
    if not problems:
        print(f"data: at most {most_passes(plan):.2f} passes")


def state_of(node: Node, study: Study) -> str:
    """The state of a run for its row of the plan; "" for a run that can start."""
    from megatron_tf.study.result import has_ended, has_failed

    if has_ended(node):
        return "has ended"
    if node.waits:
        return f"after the sweep of {node.waits}" + ("" if node.value is None else ", or its other value")
    return "has failed, runs again" if has_failed(node, study.dir) else ""


def run_study(study: Study, arguments: argparse.Namespace) -> None:
    from megatron_tf.study.machine import share
    from megatron_tf.study.queue import Queue

    check_writable(ConfigError, Path(study.dir), "Choose another dir.", "dir")
    plan = known_plan(study)
    if problems := missing(plan):
        raise ConfigError(problems)
    check_data(plan)
    own = share(study.ranks, arguments.workers)
    task = "" if arguments.task is None else f"task {arguments.task}: "
    runs, threads = text.count_of(len(plan.nodes), "run"), text.count_of(own.threads, "thread")
    print(f"{task}{runs}, {own.workers} at once with {threads} a process", flush=True)
    given = os.environ.get("OMP_NUM_THREADS", str(own.threads))
    if given != str(own.threads):
        print(
            f"{task}OMP_NUM_THREADS: {given} has no effect: each process gets its share of the cores, {own.threads} "
            "threads. --workers changes it",
            flush=True,
        )
    queue = Queue(
        study,
        workers=own.workers,
        threads=own.threads,
        devices=own.devices,
        say=lambda line: print(f"{task}{line}", flush=True),
    )
    try:
        queue.run()
    except UserError:
        with suppress(UserError):  # the first error is the one to tell, also when there is nothing to report yet
            show_report(study, None)
        raise
    show_report(study, None)


def show_report(study: Study, output: Path | None, is_timed: bool = False) -> None:
    from megatron_tf.study.machine import room_for, threads
    from megatron_tf.study.probe import probe
    from megatron_tf.study.report import write_report

    folder = Path(study.dir) if output is None else output
    measure = None
    if is_timed:
        measure = partial(probe, ranks=study.ranks, threads=threads(study.ranks, room_for(study.ranks)))
    print("\n" + write_report(known_plan(study), folder, measure))
    print(f"\n{folder}/results.json, table.txt, report.md, loss.png")


def most_passes(plan: Plan) -> float:
    """The most passes over a source of the training data, in the run that sees most tokens, its parents included."""
    from megatron_tf.data.outlook import passes_over

    most = max(plan.nodes, key=lambda node: node.end.tokens)
    found = passes_over(most.config, most.end.tokens // most.config.model.seq_length)
    return max(source.passes for source in found)


def check_data(plan: Plan) -> None:
    """ConfigError with the problems that training would find in the data of runs that are left. Data that this machine
    lacks are left to `missing`."""
    from megatron_tf.data.outlook import tokenizer_problem
    from megatron_tf.study.result import has_ended
    from megatron_tf.tasks.data import data_problems

    # seeds have the same data
    left = {(node.arm.name, node.value): node for node in plan.nodes if not has_ended(node)}
    found: dict[str, dict[str, None]] = {}
    for (arm, _), node in left.items():
        if next(machine_problems(node.config), None) is None:
            for problem in (tokenizer_problem(node.config), *data_problems(node.config)):
                if problem is not None:
                    found.setdefault(problem, {})[arm] = None
    raise_if_any(f"{text.plural('arm', len(arms))} {', '.join(arms)}: {problem}" for problem, arms in found.items())


def missing(plan: Plan) -> list[str]:
    """Sentences about files and packages that this machine lacks, each once."""
    return list(dict.fromkeys(problem for node in plan.nodes for problem in machine_problems(node.config)))
