"""What a study has found: a table, a picture and results.json, of the runs that have ended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tf.durable import prepare_output, write_atomically
from megatron_tf.errors import UserError, file_errors
from megatron_tf.study.file import Arm
from megatron_tf.study.plan import Plan
from megatron_tf.study.result import Result, read_result
from megatron_tf.study.statistics import cost_of, interval
from megatron_tf.telemetry.meters import format_duration
from megatron_tf.telemetry.plot import Ends, plot_ends
from megatron_tf.telemetry.text import size, table

Json = dict[str, Any]


def results_of(plan: Plan) -> Json:
    """All that is known, ready for JSON: each arm against the reference, and each run.

    Differences are of runs of one seed, which see the same data in the same order. Intervals are of 95 %.
    UserError when no run has ended.
    """
    runs = {node.name: result for node in plan.nodes if (result := read_result(node)) is not None}
    if not runs:
        raise UserError(f"{plan.study.dir}: no run has ended yet. Start it: megatron_tf study run FILE.")
    by_arm = {arm.name: _by_seed(plan, arm, runs) for arm in plan.study.arms}
    reference = plan.reference
    against = {} if reference is None else by_arm[reference.name]
    families = _families(plan, by_arm)
    return {
        "study": plan.study.name,
        "reference": None if reference is None else reference.name,
        "runs_ended": len(runs),
        "runs": len(plan.nodes),
        "flops_spent": sum(result.own_flops for result in runs.values()),
        "seconds_spent": sum(result.seconds for result in runs.values()),
        "arms": [_arm(plan, arm, by_arm[arm.name], against, families) for arm in plan.study.arms],
        "all_runs": [asdict(result) for result in runs.values()],
    }


def _by_seed(plan: Plan, arm: Arm, runs: Mapping[str, Result]) -> dict[int, Result]:
    nodes = [node for node in plan.of(arm) if node.waits is None and node.name in runs]
    return {node.seed: runs[node.name] for node in nodes}


def _families(
    plan: Plan, by_arm: Mapping[str, Mapping[int, Result]]
) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """By family and seed, the points (FLOPs, loss) of its arms, where there are two or more."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for arm in plan.study.arms:
        if arm.family is not None:
            for seed, result in by_arm[arm.name].items():
                found.setdefault(arm.family, {}).setdefault(seed, []).append((result.flops, result.loss))
    return {name: {seed: points for seed, points in of.items() if len(points) > 1} for name, of in found.items()}


def _arm(
    plan: Plan,
    arm: Arm,
    results: Mapping[int, Result],
    against: Mapping[int, Result],
    families: Mapping[str, Mapping[int, Sequence[tuple[float, float]]]],
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
    pairs = [result.loss - against[seed].loss for seed, result in results.items() if seed in against]
    if arm.comparable and pairs and results is not against:
        difference = interval(pairs)
        found["difference"] = {**asdict(difference), "verdict": difference.verdict}
    found["cost_against"] = {
        family: cost
        for family, curves in families.items()
        if family != arm.family and (cost := _cost(results, curves)) is not None
    }
    return found


def _cost(results: Mapping[int, Result], curves: Mapping[int, Sequence[tuple[float, float]]]) -> Json | None:
    """FLOPs of an arm over those that a family takes to its loss; `bound`: where the curve does not reach that loss."""
    costs = {seed: cost_of(result.loss, curves[seed]) for seed, result in results.items() if seed in curves}
    if not costs:
        return None
    logs = [math.log(results[seed].flops / cost.flops) for seed, cost in costs.items()]
    ratio = {key: None if value is None else math.exp(value) for key, value in asdict(interval(logs)).items()}
    beyond = {cost.beyond for cost in costs.values()} - {""}
    return {
        "ratio": ratio["mean"],
        "low": ratio["low"],
        "high": ratio["high"],
        "bound": {"more": "at most", "less": "at least"}[beyond.pop()] if beyond else None,
    }


def in_words(found: Json) -> str:
    """The table of a report and what is to be said of it."""
    families = list(dict.fromkeys(name for arm in found["arms"] for name in arm.get("cost_against", {})))
    head = ("", "parameters", "tokens", "FLOPs", "loss", "95 %", f"against {found['reference']}", "95 %", "")
    rows = [(*head, *(f"FLOPs / {family}" for family in families), "hours", "state")]
    for arm in found["arms"]:
        rows.append((*_cells(arm), *(_cost_cell(arm, family) for family in families), *_last_cells(arm)))
    lines = [table(rows, to_left=(0, 8)), ""]
    lines += [_sweep_line(arm) for arm in found["arms"] if arm["sweep"] is not None and arm["sweep"]["losses"]]
    lines.append(
        f"{found['runs_ended']} of {found['runs']} runs have ended: {found['flops_spent']:.2e} FLOPs, "
        f"{format_duration(found['seconds_spent'])} of training."
    )
    return "\n".join(lines)


def _cells(arm: Json) -> tuple[str, ...]:
    loss, difference = arm["loss"], arm.get("difference")
    first = (arm["name"], f"{arm['parameters']:,}", f"{arm['tokens']:,}", f"{arm['flops']:.2e}")
    if loss is None:
        return (*first, "", "", "", "", "not ended")
    compared = ("", "", "" if arm["comparable"] else "not compared")
    if difference is not None:
        compared = (f"{difference['mean']:+.4f}", _interval(difference, "+.4f"), difference["verdict"])
    return (*first, f"{loss['mean']:.4f}", _interval(loss, ".4f"), *compared)


def _interval(values: Json, form: str) -> str:
    return "" if values["low"] is None else f"{values['low']:{form}} to {values['high']:{form}}"


def _cost_cell(arm: Json, family: str) -> str:
    cost = arm.get("cost_against", {}).get(family)
    if cost is None:
        return ""
    within = "" if cost["low"] is None or cost["bound"] else f" ({cost['low']:.2f} to {cost['high']:.2f})"
    return f"{cost['bound'] + ' ' if cost['bound'] else ''}{cost['ratio']:.2f}{within}"


def _last_cells(arm: Json) -> tuple[str, str]:
    return ("", "") if arm["loss"] is None else (f"{arm['seconds'] / 3600:.2f}", size(arm["state_bytes"]))


def _sweep_line(arm: Json) -> str:
    sweep = arm["sweep"]
    tried = ", ".join(f"{value} {loss:.4f}" for value, loss in sweep["losses"].items())
    text = f"{arm['name']}: {sweep['key']} tried: {tried}"
    if sweep["chosen"] is None:
        return f"{text}; the others have not ended."
    at_end = ", which is at an end of the values: a better one may lie beyond" if sweep["at_end_of_values"] else ""
    return f"{text}; chosen {sweep['chosen']:g}{at_end}."


def write_report(plan: Plan, output: Path) -> str:
    """Writes results.json, table.txt and loss.png into the folder `output`; returns the table."""
    found = results_of(plan)
    text = in_words(found)
    for name, content in (("results.json", json.dumps(found, indent=1)), ("table.txt", text)):
        prepare_output(output / name)
        with file_errors(UserError, output / name, "Choose another --output."):
            write_atomically(output / name, (content + "\n").encode())
    ended = [arm for arm in found["arms"] if arm["loss"] is not None]
    ends = [
        Ends(arm["name"], arm["tokens"], arm["flops"], tuple(arm["loss"]["by_seed"].values()), arm["parent"])
        for arm in ended
    ]
    plot_ends(ends, output / "loss.png")
    return text
