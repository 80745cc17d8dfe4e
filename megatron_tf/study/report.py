"""The report of a study: tables, pictures and results.json, of the runs that have ended."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_tf.config.tasks import task_of
from megatron_tf.durable import prepare_output, write_atomically
from megatron_tf.errors import UserError, write_errors
from megatron_tf.study.clock import with_seconds
from megatron_tf.study.comparison import (
    BEST_STATIC,
    Baseline,
    against,
    best_static,
    counted,
    ended_nodes,
    family_baselines,
    growth_of,
    has_grown,
    static_curves,
    way_to,
)
from megatron_tf.study.file import Arm
from megatron_tf.study.hours import Speeds
from megatron_tf.study.law import laws_of
from megatron_tf.study.plan import Node, Plan
from megatron_tf.study.rates import transfers_of
from megatron_tf.study.result import Result, in_json, read_result
from megatron_tf.study.routing import routing_of
from megatron_tf.study.statistics import interval
from megatron_tf.study.tables import as_page, in_words
from megatron_tf.telemetry.plot import Ends, plot_ends, plot_panels

Json = dict[str, Any]
Measure = Callable[[Sequence[Node]], Speeds]
# the titles in routing.png, by measure of `routing`
PANELS = {
    "load_max": "fullest candidate: × an equal share",
    "load_spread": "evenness: exp(entropy) over candidates",
    "unused_share": "candidates with < 1/10 of their share",
    "copy_distance": "distance of a slot's candidates from their mean",
}


def results_of(plan: Plan, measure: Measure | None = None) -> Json:
    """All results, ready for JSON: each arm against the reference, and each run.

    `measure`: returns the speeds of given runs; with it arms have a cost in seconds. None: without.

    Differences are between runs of one seed, which see the same data in the same order. Intervals are of 95 %. Tokens
    are positions; people count `unit`, such as images, of `unit_tokens` positions each.
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
    clock = {} if measure is None else _clock(plan, runs, measure)
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
                "diverged": _diverged(plan, arm, runs),
                "cost_against": _costs(plan, arm, by_arm[arm.name], baselines),
                "growth": growth_of(ended_nodes(plan, arm, runs), runs, curves),
                "routing": routing_of(ended_nodes(plan, arm, runs)),
                "clock": clock.get(arm.name),
            }
            for arm in plan.study.arms
        ],
        "transfers": transfers_of(plan, runs),
        "laws": laws_of(plan, runs),
        "all_runs": [in_json(result) for result in runs.values()],
    }


def _clock(plan: Plan, runs: Mapping[str, Result], measure: Measure) -> dict[str, Json]:
    """By arm that has ended: `speed` in tokens a second, `relative_speed` to the reference, `seconds` including its
    parents, and `cost_against` others at equal time."""
    way = {node.name: node for end, _ in counted(plan, runs) for node in way_to(end)}
    speeds = measure(list(way.values()))
    timed = with_seconds(plan, runs, speeds)
    baselines = {**family_baselines(plan, timed), BEST_STATIC: best_static(static_curves(plan, timed))}
    usual = None if plan.reference is None else speeds.tokens_per_second(plan.of(plan.reference)[0])
    found = {}
    for arm in plan.study.arms:
        nodes = ended_nodes(plan, arm, timed)
        speed = speeds.tokens_per_second(nodes[0]) if nodes else None
        if speed is not None:
            found[arm.name] = {
                "speed": speed,
                "relative_speed": None if usual is None else speed / usual,
                "seconds": timed[nodes[0].name].flops,
                "cost_against": _costs(plan, arm, _by_seed(plan, arm, timed), baselines),
            }
    return found


def _diverged(plan: Plan, arm: Arm, runs: Mapping[str, Result]) -> int:
    """The number of an arm's runs that have diverged, without trials."""
    ended = [runs[node.name] for node in plan.of(arm) if node.waits is None and node.name in runs]
    return sum(not math.isfinite(result.loss) for result in ended)


def _by_seed(plan: Plan, arm: Arm, runs: Mapping[str, Result]) -> dict[int, Result]:
    return {node.seed: runs[node.name] for node in ended_nodes(plan, arm, runs)}


def _costs(plan: Plan, arm: Arm, results: Mapping[int, Result], baselines: Mapping[str, Baseline]) -> Json:
    """Against each family but its own and, for an arm that has grown, against the best of those that have not."""
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
            "losses": {f"{value:g}": loss if math.isfinite(loss) else None for value, loss in choice.losses.items()},
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
    elif pairs and results is not reference:
        cost = node.end.flops / plan.of(plan.reference)[0].end.flops if plan.reference is not None else 1.0
        found["difference_at_other_cost"] = {**asdict(interval(pairs)), "cost": cost}
    return found


def _metric(name: str, results: Mapping[int, Result], reference: Mapping[int, Result]) -> Json:
    """Of an arm: mean and interval over seeds, and both of its difference from the reference."""
    by_seed = {seed: result.metrics[name] for seed, result in results.items()}
    pairs = [value - reference[seed].metrics[name] for seed, value in by_seed.items() if seed in reference]
    difference = asdict(interval(pairs)) if pairs else None
    return {**asdict(interval(list(by_seed.values()))), "by_seed": by_seed, "difference": difference}


def write_report(plan: Plan, output: Path, measure: Measure | None = None) -> str:
    """Writes files into the folder `output`, and returns the text of table.txt. `measure` as in `results_of`.

    Files: results.json; table.txt; report.md, the same in Markdown; loss.png; a picture for each metric of the task;
    routing.png if a model chooses candidates; sweeps.png if values were tried. UserError when one cannot be written.
    """
    found = results_of(plan, measure)
    text = in_words(found)
    for name, content in (
        ("results.json", json.dumps(found, indent=1)),
        ("table.txt", text),
        ("report.md", as_page(found)),
    ):
        prepare_output(output / name)
        with write_errors(UserError, output / name, "Choose another --output."):
            write_atomically(output / name, (content + "\n").encode())
    _draw_ends(found, output)
    _draw_routing(found, output)
    _draw_sweeps(found, output)
    return text


def _draw_ends(found: Json, output: Path) -> None:
    ended = [arm for arm in found["arms"] if arm["loss"] is not None]
    unit, length = found["unit"], found["unit_tokens"]
    ends = [
        Ends(
            arm["name"],
            arm["tokens"] // length,
            arm["flops"],
            tuple(arm["loss"]["by_seed"].values()),
            arm["parent"],
            None if arm["clock"] is None else arm["clock"]["seconds"] / 3600,
        )
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


def _draw_routing(found: Json, output: Path) -> None:
    looked = {f"{arm['name']}, {kind}": of for arm in found["arms"] for kind, of in (arm["routing"] or {}).items()}
    if looked:
        panels = {
            label: {name: (of["steps"], of[measure]) for name, of in looked.items()}
            for measure, label in PANELS.items()
        }
        plot_panels(panels, output / "routing.png", "optimizer steps of the arm")


def _draw_sweeps(found: Json, output: Path) -> None:
    panels: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for arm in found["arms"]:
        tried = {} if arm["sweep"] is None else arm["sweep"]["losses"]
        points = sorted((float(value), loss) for value, loss in tried.items() if loss is not None)
        if points:
            label = f"validation loss by {arm['sweep']['key']}"
            panels.setdefault(label, {})[arm["name"]] = [value for value, _ in points], [loss for _, loss in points]
    if panels:
        plot_panels(panels, output / "sweeps.png", "value", is_log=True)
