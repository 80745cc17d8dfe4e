"""Adapters with equal numbers of parameters on one frozen base: what they learn of one text and forget of another.

Each form is tried with every learning rate and one seed, and then with its best rate and the other seeds. If a second
text is given, the adapters trained on the first are trained on the second in several ways, at the same rates.

| file of the folder | content |
|---|---|
| comparison.json | the setting that all trials share, with digests of the texts |
| trials.jsonl | a line for each trial that has ended; only the others run when the comparison is started again |
| results.json | everything, for programs |
| results.md | the table |
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_tf.adapters.fingerprint import base_facts
from megatron_tf.adapters.loading import load_base, load_tokenizer
from megatron_tf.benchmark.adapters import FORMS, LORA, forms_of, rows_on
from megatron_tf.benchmark.device import machine
from megatron_tf.durable import write_atomically
from megatron_tf.errors import NOT_AS_WRITTEN, ConfigError, DataError, UserError, file_errors, write_errors
from megatron_tf.finetuning.batches import collate
from megatron_tf.finetuning.packed import check_length, check_packing
from megatron_tf.finetuning.trial import BASE, SECOND, Outcome, Setting, Texts, Trial, read_texts, run_trial
from megatron_tf.runtime.run_folder import run_folder_lock
from megatron_tf.telemetry.line_file import whole_lines

_SETTING, _TRIALS, _RESULTS, _TABLE = "comparison.json", "trials.jsonl", "results.json", "results.md"
_ELSEWHERE = "Give another folder with --to."
_TEXTS = ("learn", "keep", "then")
Done = dict[Trial, Outcome]


@dataclass(frozen=True)
class Plan:
    """`learn`, `keep`, `then`: files of the text to learn, of the text that may be forgotten, and of the second text to
    learn.  `forms`: names of FORMS; empty: all that the base can have.  `rates`: learning rates to try.
    `seeds`: how many, from 0 on.  `rounds`: of the measurement of speed; 0: it is not measured.
    """

    setting: Setting
    learn: str
    keep: str
    then: str | None
    forms: Sequence[str]
    rates: Sequence[float]
    seeds: int
    rounds: int


def compare_adapters(plan: Plan, folder: Path, device: torch.device, say: Callable[[str], None]) -> str:
    """Run all trials that are missing; write and return the table. UserError when the folder holds another comparison
    or another process works in it, when sizes do not fit, or when the base does not keep packed examples apart."""
    plan, texts, facts = checked(plan)
    setting = {**shared(plan), "base": facts}
    check_setting(folder, setting)
    with contextlib.ExitStack() as closing:
        with write_errors(UserError, folder, "Give another folder."):
            folder.mkdir(parents=True, exist_ok=True)
            closing.enter_context(run_folder_lock(folder, key="--to"))
        # Once more: until now another process may have begun a comparison in the folder.
        _keep_setting(folder, {**check_setting(folder, setting), **setting})
        return _compare(plan, texts, folder, device, say)


def _compare(plan: Plan, texts: Texts, folder: Path, device: torch.device, say: Callable[[str], None]) -> str:
    done, path = read_trials(folder), folder / _TRIALS
    _cut_torn_line(path)
    for trial in missing(plan, done):
        done[trial] = run_trial(plan.setting, texts, trial, device)
        say(f"{_label(trial)}: {_said(done[trial])}")
        line = json.dumps({**asdict(trial), **asdict(done[trial])}) + "\n"
        with write_errors(UserError, path, "Give another folder."), open(path, "a") as file:
            file.write(line)
    speeds = _speeds(plan, texts, device) if plan.rounds else {}
    results = _results(plan, done, speeds)
    second = _second_results(plan, done)
    text = _table(_COLUMNS, results) + ("\n" + _table(_SECOND_COLUMNS, second) if second else "")
    content = {"setting": shared(plan), "machine": machine(device), "forms": results, "second_text": second,
               "speeds": list(speeds.values()),
               "trials": [{**asdict(trial), **asdict(outcome)} for trial, outcome in done.items()]}  # fmt: skip
    with write_errors(UserError, folder, "Give another folder."):
        write_atomically(folder / _RESULTS, (json.dumps(content, indent=2) + "\n").encode())
        write_atomically(folder / _TABLE, text.encode())
    return text


def checked(plan: Plan) -> tuple[Plan, Texts, dict[str, Any]]:
    """(The plan with its forms filled in, its texts, facts of the base). UserError when it cannot be carried out."""
    setting = plan.setting
    _check_batch(setting)
    texts = read_texts(plan.learn, plan.keep, plan.then, setting, load_tokenizer(setting.base))
    base = load_base(setting.base)
    check_length(base, setting.seq_length, "--seq-length")
    possible = forms_of(base)
    if impossible := [form for form in plan.forms if form not in possible]:
        raise ConfigError(
            f"--forms: {impossible[0]} is for exported TokenFormers whose activation ignores scores of 0, and "
            f"{setting.base} is none. Leave it out."
        )
    if setting.packing:
        check_packing(base, torch.device("cpu"), "--base", "Give --no-packing.")
    return replace(plan, forms=plan.forms or possible), texts, base_facts(base)


def missing(plan: Plan, done: Done) -> Iterator[Trial]:
    """Trials to run. Which ones come later depends on the results of earlier ones: `done` is read as it grows."""
    wanted: list[Callable[[], list[Trial]]] = [lambda: [Trial(BASE, 0.0, 0)]]
    for form in plan.forms:
        wanted.append(lambda form=form: [Trial(form, rate, 0) for rate in plan.rates])  # type: ignore[misc]
    for form in plan.forms:
        wanted.append(lambda form=form: _seeds(plan, done, form))  # type: ignore[misc]
    for name in _second(plan):
        wanted.append(lambda name=name: _second_trials(plan, done, name))  # type: ignore[misc]
    for trials in wanted:
        yield from [trial for trial in trials() if trial not in done]


def _seeds(plan: Plan, done: Done, form: str) -> list[Trial]:
    rate = _best_rate(plan, done, form)
    return [] if rate is None else [Trial(form, rate, seed) for seed in range(1, plan.seeds)]


def _second(plan: Plan) -> list[str]:
    """The names of SECOND whose forms are in the plan; empty without a second text."""
    return [name for name, (form, _) in SECOND.items() if plan.then and form in plan.forms]


def _second_trials(plan: Plan, done: Done, name: str) -> list[Trial]:
    rate = _best_rate(plan, done, SECOND[name][0])
    return [] if rate is None else [Trial(name, rate, seed) for seed in range(plan.seeds)]


def _best_rate(plan: Plan, done: Done, form: str) -> float | None:
    """The rate with the lowest loss on held-out text at the first seed; None when all have diverged."""
    losses = {rate: done[Trial(form, rate, 0)].held for rate in plan.rates}
    ended = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(ended, key=ended.__getitem__, default=None)


def _results(plan: Plan, done: Done, speeds: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each form, the base first."""
    base = done[Trial(BASE, 0.0, 0)]
    assert base.held is not None and base.keep is not None
    found: list[dict[str, Any]] = [{"adapter": "none", "parameters": 0, "rate": None, "seeds": 1, "held": base.held,
                                    "held_spread": None, "keep": base.keep, "keep_spread": None}]  # fmt: skip
    for form in plan.forms:
        rate = _best_rate(plan, done, form)
        own = [done[Trial(form, rate, seed)] for seed in range(plan.seeds)] if rate is not None else []
        held, keep = ([value for one in own if (value := getattr(one, name)) is not None] for name in ("held", "keep"))
        found.append(
            {
                "adapter": FORMS[form],
                "parameters": done[Trial(form, plan.rates[0], 0)].parameters,
                "rate": rate,
                # a better rate may lie outside of those that were tried
                "rate_at_end": len(plan.rates) > 1 and rate in (min(plan.rates), max(plan.rates)),
                "seeds": len(held),
                "held": _mean(held),
                "held_spread": max(held) - min(held) if len(held) > 1 else None,
                "learnt": base.held - statistics.fmean(held) if held else None,
                "keep": _mean(keep),
                "keep_spread": max(keep) - min(keep) if len(keep) > 1 else None,
                "forgotten": statistics.fmean(keep) - base.keep if keep else None,
                "tokens_per_second": _mean([one.tokens_per_second for one in own if one.tokens_per_second]),
                "peak_bytes": max((one.peak_bytes for one in own if one.peak_bytes), default=None),
                **{key: speeds[FORMS[form]][name] for key, name in _MEASURED.items() if FORMS[form] in speeds},
            }
        )
    return found


def _second_results(plan: Plan, done: Done) -> list[dict[str, Any]]:
    """One entry for each way to train on the second text."""
    found = []
    for name in _second(plan):
        trials = [trial for trial in _second_trials(plan, done, name) if done[trial].held is not None]
        after = [done[trial] for trial in trials]
        before = [done[Trial(SECOND[name][0], trial.rate, trial.seed)] for trial in trials]
        lost = [one.first - other.held for one, other in zip(after, before)
                if one.first is not None and other.held is not None]  # fmt: skip
        held = [one.held for one in after if one.held is not None]
        found.append(
            {
                "adapter": SECOND[name][1],
                "parameters": after[0].parameters if after else 0,
                "rate": trials[0].rate if trials else None,
                "seeds": len(held),
                "held": _mean(held),
                "held_spread": max(held) - min(held) if len(held) > 1 else None,
                "first": _mean([one.first for one in after if one.first is not None]),
                "first_forgotten": _mean(lost),
                "keep": _mean([one.keep for one in after if one.keep is not None]),
                "tokens_per_second": _mean([one.tokens_per_second for one in after if one.tokens_per_second]),
            }
        )
    return found


# key in results.json -> column of the benchmark
_MEASURED = {"training_of_lora": "training × LoRA", "kept_mib_above_base": "above base MiB"}
_COLUMNS = {
    "adapter": "adapter", "parameters": "parameters", "rate": "rate", "seeds": "seeds", "held": "held-out loss",
    "held_spread": "spread", "learnt": "learnt", "keep": "other text's loss", "keep_spread": "spread",
    "forgotten": "forgotten", "tokens_per_second": "tokens/s", "training_of_lora": "training × LoRA",
    "kept_mib_above_base": "kept above base, MiB",
}  # fmt: skip


_SECOND_COLUMNS = {
    "adapter": "then, on the second text", "parameters": "trained", "rate": "rate", "seeds": "seeds",
    "held": "held-out loss", "held_spread": "spread", "first": "first text's loss", "first_forgotten": "forgotten",
    "keep": "other text's loss", "tokens_per_second": "tokens/s",
}  # fmt: skip
_LOSSES = ("held", "held_spread", "learnt", "keep", "keep_spread", "forgotten", "first", "first_forgotten")


def _table(columns: Mapping[str, str], results: Sequence[Mapping[str, Any]]) -> str:
    """A table in Markdown. A best rate at an end of those that were tried has a star."""
    lines = [f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
    for entry in results:
        cells = [_cell(key, entry.get(key)) + ("*" if key == "rate" and entry.get("rate_at_end") else "")
                 for key in columns]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if key in ("parameters", "seeds"):
        return f"{value:,}"
    return f"{value:.4f}" if key in _LOSSES else f"{value:.3g}"


def _speeds(plan: Plan, texts: Texts, device: torch.device) -> dict[str, Mapping[str, Any]]:
    """By form, measured in turns on the base itself in fp32; empty without LoRA, which the others are compared with."""
    if LORA not in plan.forms:
        return {}
    batch = collate(texts.learn[: plan.setting.micro_batch], plan.setting.length)
    found = rows_on(lambda: load_base(plan.setting.base), batch.input_ids.to(device), plan.setting.rank, plan.forms,
                    plan.rounds)  # fmt: skip
    return {str(row["adapter"]): row for row in found}


def shared(plan: Plan) -> dict[str, Any]:
    """The setting that trials share, ready for JSON. It leaves out the micro batch, which changes only rounding, and
    the base's path: facts of the base itself are compared instead."""
    setting = asdict(plan.setting)
    del setting["base"], setting["micro_batch"]
    texts = {name: getattr(plan, name) for name in _TEXTS}
    return {**setting, **{name: _digest(file) for name, file in texts.items() if file is not None}}


def check_setting(folder: Path, setting: Mapping[str, Any]) -> dict[str, Any]:
    """The setting in the folder's comparison.json, {} for a new folder. UserError when it differs from `setting`.
    Nothing is written. Files of earlier versions lack `packing`: it was always on."""
    path = folder / _SETTING
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file. Give another folder with --to.")
        return {}
    with file_errors(UserError, path, "Give another folder."):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        before = json.loads(text)
    except NOT_AS_WRITTEN:
        before = None
    if not isinstance(before, dict) or not before:
        raise UserError(f"{path}: is damaged, so what the trials have in common is not known. {_ELSEWHERE}")
    known = {"packing": True, **before}
    for key, value in setting.items():
        if known.get(key, value) != value:
            raise UserError(f"{folder}: is of a comparison with {_differing(key, known[key], value)}. {_ELSEWHERE}")
    return before


def _keep_setting(folder: Path, setting: Mapping[str, Any]) -> None:
    path = folder / _SETTING
    with write_errors(UserError, path, "Give another folder."):
        write_atomically(path, (json.dumps(setting, indent=2) + "\n").encode())


def _differing(key: str, before: Any, now: Any) -> str:
    """A difference between the folder's setting and the present one, in words, because people cannot read digests."""
    if key == "base":
        one, other = (
            "a {model_type} of {num_layers} layers × {hidden_size}".format(**facts) for facts in (before, now)
        )
        now_is = other if one != other else "one of the same shape with other weights"
        return f"another base, {one}, and this one is {now_is}"
    if key in _TEXTS:
        return f"another text: the file of --{key} was not what it is now"
    return f"{key} {before}, and this one has {now}"


def _check_batch(setting: Setting) -> None:
    if setting.batch % setting.micro_batch:
        raise ConfigError(
            f"--batch: {setting.batch} is not a multiple of --micro-batch {setting.micro_batch}. Set it to a multiple "
            f"of {setting.micro_batch}, or --micro-batch to a divisor of {setting.batch}."
        )


def read_trials(folder: Path) -> Done:
    """The trials that have ended. A last line that is still being written does not count. UserError for a whole line
    that is not a trial. Nothing is written."""
    path, done = folder / _TRIALS, Done()
    if not path.exists():
        return done
    with file_errors(UserError, path, "Give another folder."):
        lines = whole_lines(path.read_bytes())
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            trial = Trial(*(record.pop(name) for name in Trial.__dataclass_fields__))
            done[trial] = Outcome(**record)
        except NOT_AS_WRITTEN:
            raise UserError(
                f"{path}: line {number} is no trial. Remove the line, and its trial runs again, or give another "
                "folder with --to."
            ) from None
    return done


def _cut_torn_line(path: Path) -> None:
    """Removes an incomplete last line, left by a kill, so that the next one begins a line of its own."""
    if not path.exists():
        return
    with file_errors(UserError, path, "Give another folder."):
        whole, end, torn = path.read_bytes().rpartition(b"\n")
        if torn:
            write_atomically(path, whole + end)


def _digest(file: str) -> str:
    with file_errors(DataError, file, "Give a readable file."):
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _label(trial: Trial) -> str:
    if trial.form == BASE:
        return "the base alone"
    name = SECOND[trial.form][1] if trial.form in SECOND else FORMS[trial.form]
    return f"{name}, rate {trial.rate:g}, seed {trial.seed}"


def _said(outcome: Outcome) -> str:
    if outcome.held is None or outcome.keep is None:
        return "diverged"
    speed = f", {outcome.tokens_per_second:,.0f} tokens/s" if outcome.tokens_per_second else ""
    first = f", first text's {outcome.first:.4f}" if outcome.first is not None else ""
    return f"held-out loss {outcome.held:.4f}{first}, other text's {outcome.keep:.4f}{speed}"
