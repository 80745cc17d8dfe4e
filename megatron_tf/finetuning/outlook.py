"""The trials that a comparison of adapters has still to run, and how long they take. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_tf.adapters.loading import load_base
from megatron_tf.benchmark.adapters import trained_parameters, with_adapter
from megatron_tf.finetuning.comparison import Plan, check_setting, checked, missing, read_trials, shared
from megatron_tf.finetuning.steps import Computing, backward, mean_loss
from megatron_tf.finetuning.trial import BASE, SECOND, Outcome, Setting, Texts, Trial
from megatron_tf.telemetry.text import count_of

_FORM = "modules"


def foresee(plan: Plan, folder: Path, device: torch.device) -> str:
    """Trials, work and time that are left, as text. UserError as in `compare_adapters`."""
    plan, texts, facts = checked(plan)
    check_setting(folder, {**shared(plan), "base": facts})
    done = read_trials(folder)
    left, known = [], dict(done)
    for trial in missing(plan, known):
        left.append(trial)
        # any outcome will do, because the number of trials does not depend on which rate is the best
        known[trial] = Outcome(0, 0.0, 0.0)
    trained = sum(_trained(plan.setting, trial) for trial in left)
    measured = sum(_measured(texts, trial) for trial in left)
    costs = _costs(plan.setting, texts, device)
    minutes = (len(left) * costs["load"] + trained * costs["train"] + measured * costs["measure"]) / 60
    unit = "core" if device.type == "cpu" else "GPU"
    return (
        f"trials  {len(left)} of {len(left) + len(done)} left\n"
        f"work    {count_of(trained, 'sequence')} to train on, {measured:,} to measure on\n"
        f"time    about {minutes:,.1f} {unit}-minutes, by {costs['train']:.3g} and {costs['measure']:.3g} "
        f"{unit}-seconds a sequence that were measured now, and {costs['load']:.3g} to load the base"
        f"{'' if not plan.rounds else '; the rounds that compare speeds come on top'}"
    )


def _trained(setting: Setting, trial: Trial) -> int:
    """Sequences that a trial trains on."""
    return 0 if trial.form == BASE else setting.steps * setting.batch * (2 if trial.form in SECOND else 1)


def _measured(texts: Texts, trial: Trial) -> int:
    """Sequences whose loss a trial measures."""
    second = len(texts.then_held) if trial.form in SECOND else 0
    return len(texts.held) + len(texts.keep) + second


def _costs(setting: Setting, texts: Texts, device: torch.device) -> Mapping[str, float]:
    """Seconds to load the base, and to train and measure on one sequence: processor time; on a GPU wall time."""
    bf16 = setting.precision == "bf16"
    computing = Computing(device, 0, 1, bf16, setting.length, setting.micro_batch, False)
    rows = texts.learn[: setting.micro_batch]

    def load() -> Any:
        return load_base(setting.base, torch.bfloat16 if bf16 else torch.float32).to(device)

    model = with_adapter(load(), _FORM, setting.rank)
    parameters = trained_parameters(model)
    works: dict[str, Callable[[], object]] = {
        "load": load,
        "train": lambda: backward(model, rows, parameters, computing),
        "measure": lambda: mean_loss(model, rows, computing),
    }
    for name in ("train", "measure"):
        works[name]()  # not timed, because the first call allocates memory
    found = {name: _seconds(work, device) for name, work in works.items()}
    return {"load": found["load"], **{name: found[name] / len(rows) for name in ("train", "measure")}}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    began = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began
