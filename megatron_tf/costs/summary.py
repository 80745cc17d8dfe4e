"""A plan as one plain object. `tools/plan_run.py --json` prints it, and `report` makes the text from it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tf.config.run_plan import plan_batches, topology_for
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.config.stages import stage_name
from megatron_tf.config.tasks import task_of
from megatron_tf.config.validate import validate
from megatron_tf.costs.advice import advise
from megatron_tf.costs.banks import bank_costs
from megatron_tf.costs.chain import chain_costs, left_out_steps
from megatron_tf.costs.checkpoints import plan_checkpoints
from megatron_tf.costs.communication import sent_bytes_per_step
from megatron_tf.costs.estimate import memory_per_rank, num_parameters, num_used_parameters, parameters_per_rank
from megatron_tf.costs.hardware import Assumptions, Gpu
from megatron_tf.costs.law import ASSUMED_KAPPA, Findings, Range
from megatron_tf.costs.layouts import Estimate, estimate, ranked
from megatron_tf.errors import CheckpointError, ConfigError, DataError
from megatron_tf.growth.candidates import missing_candidates
from megatron_tf.growth.rules import chain_problems, growth_problems


@dataclass(frozen=True)
class Circumstances:
    """Everything that a plan depends on besides the configuration: hardware, failures, κ, budget."""

    num_gpus: int
    gpu: Gpu
    failures_per_gpu_year: float
    storage_bytes_per_second: float
    restart_seconds: float
    num_best: int  # layouts to name
    scratch_tokens: int | None = None
    findings: Findings | None = None  # of a study
    kappa: Range | None = None  # None: that of the findings, or an assumption
    budget: float | None = None  # FLOPs; None: those of the chain
    assumed: Assumptions = Assumptions()


def plan(configs: Sequence[RunConfig], circumstances: Circumstances) -> dict[str, Any]:
    """The plan of a run, or of a chain of runs. A configuration that cannot run raises nothing: see `problems`.

    Keys: gpu, gpus, problems (of stages that cannot grow from each other), stages (see `_stage`), chain (see StageCost;
    empty for one run, or when a stage cannot run), kappa (the origin of the chain's κ, in words), advice (see `advise`;
    None without a chain or findings), assumptions. Units are bytes, seconds, FLOPs and tokens, unless a key names
    another. All but memory, sent bytes and sizes are estimates. ConfigError when `scratch_tokens` is too small.
    """
    stages, estimates = [], []
    for number in range(len(configs)):
        summary, chosen = _stage(configs, number, circumstances)
        stages.append(summary)
        if chosen is not None:
            estimates.append(chosen)
    problems = chain_problems(configs)
    whole = len(configs) > 1 and len(estimates) == len(configs) and not problems
    gpu = circumstances.gpu
    kappa, source = _kappa(circumstances)
    costs = chain_costs(estimates, kappa, circumstances.scratch_tokens) if whole else []
    advice = None
    if costs and circumstances.findings is not None:
        advice = advise(configs, circumstances.findings, kappa, circumstances.budget or costs[-1].chain_flops)
    return {
        "gpu": {**asdict(gpu), "bf16_flops": gpu.peak_flops("bf16")},
        "gpus": circumstances.num_gpus,
        "problems": problems,
        "stages": stages,
        "chain": [asdict(cost) for cost in costs],
        "kappa": source,
        "advice": advice,
        "assumptions": list(circumstances.assumed.sentences()),
    }


def _kappa(circumstances: Circumstances) -> tuple[Range, str]:
    """The least and greatest κ, and their origin as the end of a sentence."""
    findings = circumstances.findings
    if circumstances.scratch_tokens is not None:
        return ASSUMED_KAPPA, "as --scratch-tokens has it"
    if circumstances.kappa is not None:
        return circumstances.kappa, "as given by --kappa"
    if findings is not None and findings.kappa is not None:
        return findings.kappa, f"as measured in {findings.source}"
    return ASSUMED_KAPPA, "an assumption; a study measures it"


def _stage(
    configs: Sequence[RunConfig], number: int, circumstances: Circumstances
) -> tuple[dict[str, Any], Estimate | None]:
    """The summary of one run, and its estimate under its own layout, which is None when it cannot run as configured.

    Keys `unit` and `unit_tokens`: the unit in which the task's samples are counted ("tokens", "images"), and the
    positions of one unit. Key `banks`: see BankCosts; None for a model without candidates. Key `growth`: what is known
    of the smaller model, in words; None without growth, and in a chain.
    """
    config, is_alone = configs[number], len(configs) == 1
    world, gpu, assumed = circumstances.num_gpus, circumstances.gpu, circumstances.assumed

    def named(overrides: Sequence[str]) -> list[str]:
        return [override if is_alone else f"stages.{stage_name(config)}.{override}" for override in overrides]

    def choice(own: Estimate) -> dict[str, Any]:
        return {**_choice(own), "overrides": named(own.overrides())}

    parent = _parent_of(config.growth) if is_alone and config.growth is not None else None
    summary: dict[str, Any] = {
        "name": config.run.name,
        "unit": task_of(config.model).unit,
        "unit_tokens": task_of(config.model).unit_length(config.model),
        "parameters": num_parameters(config.model),
        "used_parameters": num_used_parameters(config.model),
        "problems": [],
        "best_layouts": [choice(best) for best in ranked(config, world, gpu, assumed)[: circumstances.num_best]],
    }
    try:
        validate(config, world)
    except ConfigError as error:
        summary["problems"] += error.problems
    summary["problems"] += _tokenizer_problems(config)
    if is_alone:
        summary["problems"] += _growth_problems(config, parent)
    if summary["problems"]:
        return summary, None
    chosen = estimate(config, world, gpu, assumed)
    topology, batches = topology_for(config, world), plan_batches(config, world)

    def can_run(changed: RunConfig) -> bool:
        if is_alone:
            return not _growth_problems(changed, parent)
        return not chain_problems([*configs[:number], changed, *configs[number + 1 :]])

    time, banks = chosen.time, bank_costs(chosen, gpu, assumed, can_run)
    train_seconds = batches.train_steps * time.total
    checkpoints = plan_checkpoints(
        config.model,
        world if config.zero.stage else topology.tensor * topology.pipeline,
        time.total,
        asynchronous=config.checkpoint.asynchronous,
        configured_steps=config.checkpoint.interval_steps or batches.train_steps,
        failures_per_gpu_year=circumstances.failures_per_gpu_year,
        storage_bytes_per_second=circumstances.storage_bytes_per_second,
        restart_seconds=circumstances.restart_seconds,
        num_gpus=world,
        optimizer=config.optimizer.type,
    )
    lost = checkpoints.configured_lost_share
    hours = train_seconds / (1 - lost) / 3600 if lost < 1 else math.inf
    summary |= {
        **choice(chosen),
        "fits": chosen.fits,
        "precision": config.training.precision,
        "parameters_per_rank": parameters_per_rank(config.model, topology),
        "memory": {**asdict(chosen.memory), "total": chosen.memory.total},
        "usable_memory": assumed.usable_memory * (gpu.memory_bytes - assumed.reserved_bytes),
        "activations_by_checkpointing": _activations(config, world),
        "banks": None if banks is None else _with_names(asdict(banks), named),
        "growth": None if not is_alone or config.growth is None else _growth_in_words(config.growth, parent),
        "num_micro_batches": batches.num_micro_batches,
        "step": {**asdict(time), "total": time.total, "tokens_per_second": time.tokens_per_second},
        "sent_bytes": sent_bytes_per_step(config, world),
        "run": {
            "steps": batches.train_steps,
            "tokens": batches.train_tokens,
            "flops": time.flops * batches.train_steps,
            "hours_without_failures": train_seconds / 3600,
            "hours": _finite(hours),
            "gpu_hours": _finite(hours * world),
            "megawatt_hours": _finite(hours * world * gpu.watts / 1e6),
        },
        "checkpoint": {
            **asdict(checkpoints),
            "mean_between_failures": _finite(checkpoints.mean_between_failures),
            "configured_steps": config.checkpoint.interval_steps,
        },
        "data": _data(
            config, _samples_before(configs, number, world) + batches.train_steps * batches.global_batch_size
        ),
    }
    return summary, chosen


def _with_names(banks: dict[str, Any], named: Callable[[Sequence[str]], list[str]]) -> dict[str, Any]:
    """`banks` with remedies whose overrides are `named`."""
    kinds = "memory_remedies", "exchange_remedies"
    return banks | {kind: [own | {"overrides": named(own["overrides"])} for own in banks[kind]] for kind in kinds}


class Parent(NamedTuple):
    """A checkpoint on this machine that a run grows from."""

    path: Path
    model: Model


def _parent_of(growth: Growth) -> Parent | None:
    """None when the run's source is not on this machine, holds no complete checkpoint yet, or torch is missing."""
    if not os.path.exists(growth.source):
        return None
    try:
        from megatron_tf.checkpoint.architecture import stored_model
        from megatron_tf.checkpoint.moments import resolve_at
        from megatron_tf.checkpoint.reader import open_checkpoint

        reader = open_checkpoint(resolve_at(growth.source, growth.at))
        return Parent(reader.path, stored_model(reader.index))
    except (CheckpointError, ModuleNotFoundError):
        return None


def _growth_problems(config: RunConfig, parent: Parent | None) -> list[str]:
    """Why the one run cannot grow from its parent, as far as that is known."""
    if config.growth is None:
        return []
    if parent is None:
        return [f"{problem}." for problem in missing_candidates(config.model, config.growth)]
    return growth_problems(parent.model, config.model, config.growth)


def _growth_in_words(growth: Growth, parent: Parent | None) -> str:
    if parent is None:
        return f"from {growth.source}, of which no checkpoint can be read here: whether it can grow was not checked"
    return f"from {parent.path}, {num_parameters(parent.model):,} parameters"


def _tokenizer_problems(config: RunConfig) -> list[str]:
    if not _is_here(config):
        return []
    from megatron_tf.data.outlook import tokenizer_problem

    problem = tokenizer_problem(config)
    return [problem] if problem else []


def _samples_before(configs: Sequence[RunConfig], number: int, world_size: int) -> int:
    """Samples that the stages before stage `number` read, where it goes on reading; 0 if one of them cannot run."""
    samples = 0
    try:
        for config, after in zip(configs[:number], configs[1:]):
            batches = plan_batches(config, world_size)
            samples += (batches.train_steps - left_out_steps(config, after)) * batches.global_batch_size
            if (config.run.seed, config.data.train) != (after.run.seed, after.data.train):
                samples = 0
    except ConfigError:
        return 0
    return samples


def _data(config: RunConfig, samples: int) -> dict[str, Any] | None:
    """Passes of `samples` over each source, and warnings; None when the data are not on this machine or cannot be
    read."""
    if not _is_here(config):
        return None
    from megatron_tf.data.outlook import data_warnings, describe_passes, passes_over

    try:
        passes = passes_over(config, samples)
        warnings = data_warnings(config, passes)
    except DataError:
        return None
    return {
        "sources": [asdict(source) for source in passes],
        "words": describe_passes(passes),
        "warnings": warnings,
    }


def _is_here(config: RunConfig) -> bool:
    """Whether any of the data is on this machine. If not, the modules that read data are not imported."""
    prefixes = [source.path for source in (*config.data.train, *config.data.validation)]
    return any(map(os.path.exists, [f"{prefix}.idx" for prefix in prefixes] + [config.data.tokenizer or ""]))


def _choice(choice: Estimate) -> dict[str, Any]:
    time = choice.time
    return {
        "layout": str(choice),
        "overrides": choice.overrides(),
        "step_seconds": time.total,
        "mfu": time.mfu,
        "bubble_share": time.bubble_share,
        "communication_share": time.communication_share,
        "memory_total": choice.memory.total,
    }


def _activations(config: RunConfig, world_size: int) -> dict[str, int]:
    sizes = {}
    for name, on in (("off", False), ("on", True)):
        training = config.training.model_copy(update={"activation_checkpointing": on})
        sizes[name] = memory_per_rank(config.model_copy(update={"training": training}), world_size).activations
    return sizes


def _finite(value: float) -> float | None:
    """`value`, or None when it is not finite: JSON has no infinity."""
    return value if math.isfinite(value) else None
