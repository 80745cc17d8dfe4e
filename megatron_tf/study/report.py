"""What a study has found: a table, a picture and results.json, of the runs that have ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_tf.config.tasks import task_of
from megatron_tf.costs.law import law_of
from megatron_tf.durable import prepare_output, write_atomically
from megatron_tf.errors import UserError, file_errors
from megatron_tf.study.comparison import (
    BEST_STATIC,
    Baseline,
    against,
    best_static,
    ended_nodes,
    family_baselines,
    growth_of,
    has_grown,
    static_curves,
)
from megatron_tf.study.comparison_words import compared, within
from megatron_tf.study.file import Arm
from megatron_tf.study.law import laws_of
from megatron_tf.study.plan import Plan
from megatron_tf.study.result import Result, read_result
from megatron_tf.study.statistics import interval
from megatron_tf.telemetry.meters import format_duration
from megatron_tf.telemetry.plot import Ends, plot_ends
from megatron_tf.telemetry.text import size, table

Json = dict[str, Any]


def results_of(plan: Plan) -> Json:
    """All that is known, ready for JSON: each arm against the reference, and each run.

    Differences are of runs of one seed, which see the same data in the same order. Intervals are of 95 %. Tokens are
    positions; people count `unit`, of `unit_tokens` positions each.
    UserError when no run has ended.
    """
    runs = {node.name: result for node in plan.nodes if (result := read_result(node)) is not None}
    if not runs:
        raise UserError(f"{plan.study.dir}: no run has ended yet. Start it: megatron_tf study run FILE.")
    by_arm = {arm.name: _by_seed(plan, arm, runs) for arm in plan.study.arms}
    reference = plan.reference
    of_reference = {} if reference is None else by_arm[reference.name]
    curves, task = static_curves(plan, runs), task_of(plan.nodes[0].config.model)
    baselines = {**family_baselines(plan, runs), BEST_STATIC: best_static(curves)}
    return {
        "study": plan.study.name,
        "unit": task.unit,
        "unit_tokens": task.unit_length(plan.nodes[0].config.model),
        "reference": None if reference is None else reference.name,
        "runs_ended": len(runs),
        "runs": len(plan.nodes),
        "flops_spent": sum(result.own_flops for result in runs.values()),
        "seconds_spent": sum(result.seconds for result in runs.values()),
        "arms": [
            {
                **_arm(plan, arm, by_arm[arm.name], of_reference),
                "cost_against": _costs(plan, arm, by_arm[arm.name], baselines),
                "growth": growth_of(ended_nodes(plan, arm, runs), runs, curves),
            }
            for arm in plan.study.arms
        ],
        "laws": laws_of(plan, runs),
        "all_runs": [asdict(result) for result in runs.values()],
    }


def _by_seed(plan: Plan, arm: Arm, runs: Mapping[str, Result]) -> dict[int, Result]:
    return {node.seed: runs[node.name] for node in ended_nodes(plan, arm, runs)}


def _costs(plan: Plan, arm: Arm, results: Mapping[int, Result], baselines: Mapping[str, Baseline]) -> Json:
    """Against each family that is not its own and, for an arm that has grown, whichever arm is best that has not."""
    found = {}
    for name, baseline in baselines.items():
        if name == arm.family or (name == BEST_STATIC and not has_grown(plan.of(arm)[0])):
            continue
        if (cost := against(results, baseline, plan.study.tolerance)) is not None:
            found[name] = cost
    return found


def _arm(
    plan: Plan,
    arm: Arm,
    results: Mapping[int, Result],
    reference: Mapping[int, Result],
) -> Json:
    node, choice = plan.of(arm)[0], plan.choices.get(arm.name)
    found: Json = {
        "name": arm.name,
        "parent": arm.parent,
        "by": arm.by if arm.parent else None,
        "comparable": arm.comparable,
        "parameters": node.parameters,
        "tokens": node.end.tokens,
        "flops": node.end.flops,
        "own_flops": node.own_flops,
        "sweep": None,
        "ended": len(results),
        "seeds": len(plan.study.seeds_of(arm)),
        "loss": None,
    }
    if choice is not None and arm.sweep is not None:
        found["sweep"] = {
            "key": arm.sweep.key,
            "chosen": choice.value,
            "at_end_of_values": choice.at_end,
            "losses": {f"{value:g}": loss for value, loss in choice.losses.items()},
        }
    if not results:
        return found
    losses = {seed: result.loss for seed, result in results.items()}
    found["loss"] = {**asdict(interval(list(losses.values()))), "by_seed": losses}
    found["seconds"] = sum(result.seconds for result in results.values()) / len(results)
    found["state_bytes"] = next(iter(results.values())).state_bytes
    found["metrics"] = {
        name: _metric(name, results, reference if arm.comparable and results is not reference else {})
        for name in next(iter(results.values())).metrics
    }
    pairs = [result.loss - reference[seed].loss for seed, result in results.items() if seed in reference]
    if arm.comparable and pairs and results is not reference:
        difference = interval(pairs)
        found["difference"] = {**asdict(difference), "verdict": difference.verdict}
    return found


def _metric(name: str, results: Mapping[int, Result], reference: Mapping[int, Result]) -> Json:
    """Of an arm: mean and interval over seeds, and the same of its difference from the reference."""
    by_seed = {seed: result.metrics[name] for seed, result in results.items()}
    pairs = [value - reference[seed].metrics[name] for seed, value in by_seed.items() if seed in reference]
    difference = asdict(interval(pairs)) if pairs else None
    return {**asdict(interval(list(by_seed.values()))), "by_seed": by_seed, "difference": difference}


def in_words(found: Json) -> str:
    """The table of a report and what is to be said of it."""
    head = ("", "parameters", found["unit"], "FLOPs", "loss", "95 %", f"against {found['reference']}", "95 %", "")
    rows: list[tuple[str, ...]] = [(*head, "hours", "state")]
    rows += [(*_cells(arm, found["unit_tokens"]), *_last_cells(arm)) for arm in found["arms"]]
    lines = [table(rows, to_left=(0, 8)), "", *_metric_lines(found)]
    lines += compared(found["arms"])
    lines += [_law_line(name, law) for name, law in found["laws"].items()]
    lines += [_sweep_line(arm) for arm in found["arms"] if arm["sweep"] is not None and arm["sweep"]["losses"]]
    lines.append(
        f"{found['runs_ended']} of {found['runs']} runs have ended: {found['flops_spent']:.2e} FLOPs, "
        f"{format_duration(found['seconds_spent'])} of training."
    )
    return "\n".join(lines)


def _metric_lines(found: Json) -> list[str]:
    """A table of the task's metrics, of the arms that have ended; nothing where it has none."""
    measured = [arm for arm in found["arms"] if arm.get("metrics")]
    rows: list[Sequence[str]] = []
    for arm in measured:
        cells = [arm["name"]]
        for value in arm["metrics"].values():
            cells += [f"{value['mean']:.4f}", within(value, ".4f")]
            difference = value["difference"]
            cells += ["", ""] if difference is None else [f"{difference['mean']:+.4f}", within(difference, "+.4f")]
        rows.append(cells)
    if not rows:
        return []
    head = [""]
    for name in measured[0]["metrics"]:
        head += [name, "95 %", f"against {found['reference']}", "95 %"]
    return [table([head, *rows]), ""]


def _cells(arm: Json, unit_tokens: int) -> tuple[str, ...]:
    loss, difference = arm["loss"], arm.get("difference")
    first = (arm["name"], f"{arm['parameters']:,}", f"{arm['tokens'] / unit_tokens:,.0f}", f"{arm['flops']:.2e}")
    if loss is None:
        return (*first, "", "", "", "", "not ended")
    compared = ("", "", "" if arm["comparable"] else "not compared")
    if difference is not None:
        compared = (f"{difference['mean']:+.4f}", within(difference, "+.4f"), difference["verdict"])
    *numbers, verdict = compared
    if arm["ended"] < arm["seeds"]:
        verdict = ", ".join(filter(None, (verdict, f"{arm['ended']} of {arm['seeds']} seeds")))
    return (*first, f"{loss['mean']:.4f}", within(loss, ".4f"), *numbers, verdict)


def _last_cells(arm: Json) -> tuple[str, str]:
    return ("", "") if arm["loss"] is None else (f"{arm['seconds'] / 3600:.2f}", size(arm["state_bytes"]))


def _law_line(architecture: str, law: Json) -> str:
    missing = law.get("missing")
    return f"law of a {architecture}: {law_of(law).in_words() if missing is None else f'none; {missing}'}."


def _sweep_line(arm: Json) -> str:
    sweep = arm["sweep"]
    tried = ", ".join(f"{value} {loss:.4f}" for value, loss in sweep["losses"].items())
    text = f"{arm['name']}: {sweep['key']} tried: {tried}"
    if sweep["chosen"] is None:
        return f"{text}; the others have not ended."
    at_end = ", which is at an end of the values: a better one may lie beyond" if sweep["at_end_of_values"] else ""
    return f"{text}; chosen {sweep['chosen']:g}{at_end}."


def write_report(plan: Plan, output: Path) -> str:
    """Writes results.json, table.txt, loss.png and a picture of each metric of the task into the folder `output`; returns the table."""
    found = results_of(plan)
    text = in_words(found)
    for name, content in (("results.json", json.dumps(found, indent=1)), ("table.txt", text)):
        prepare_output(output / name)
        with file_errors(UserError, output / name, "Choose another --output."):
            write_atomically(output / name, (content + "\n").encode())
    ended = [arm for arm in found["arms"] if arm["loss"] is not None]
    unit, length = found["unit"], found["unit_tokens"]
    ends = [
        Ends(arm["name"], arm["tokens"] // length, arm["flops"], tuple(arm["loss"]["by_seed"].values()), arm["parent"])
        for arm in ended
    ]
    plot_ends(ends, output / "loss.png", unit=unit)
    for name in {name: None for arm in ended for name in arm["metrics"]}:
        of_metric = [
            replace(end, values=tuple(arm["metrics"][name]["by_seed"].values()))
            for end, arm in zip(ends, ended)
            if name in arm["metrics"]
        ]
        plot_ends(of_metric, output / f"{name}.png", name, unit)
    return text
