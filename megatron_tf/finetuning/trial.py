"""One adapter trained on one text, and what the model knows afterwards: losses on this text and on another one."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tf.adapters.loading import load_base
from megatron_tf.benchmark.adapters import trained_parameters, with_adapter
from megatron_tf.engine.schedule import learning_rate
from megatron_tf.errors import DataError, TrainingError
from megatron_tf.finetuning.batches import Row, count_targets, pack, rows_of_step
from megatron_tf.finetuning.examples import Example, read_examples
from megatron_tf.finetuning.steps import Computing, backward, mean_loss
from megatron_tf.optimizers.adamw import AdamWOptimizer

BASE = "none"  # the base alone
_HELD_OUT = 10  # one in so many examples, the last ones, is not trained on
_WARM_UP = 10  # one in so many steps
_CLIPPING = 1.0
_UNTIMED = 2  # steps, in which memory is allocated


@dataclass(frozen=True)
class Setting:
    """What all trials have in common.

    `rank`: of LoRA, which all others have as many parameters as.  `batch`: sequences of a step, `micro_batch` of them
    at once.  `measured`: sequences that a loss is measured on, at most.
    """

    base: Path
    precision: str
    rank: int
    steps: int
    batch: int
    micro_batch: int
    seq_length: int
    measured: int


@dataclass(frozen=True)
class Texts:
    """Packed sequences: trained on, held out of the same text, and of the text that may be forgotten."""

    learn: Sequence[Row]
    held: Sequence[Row]
    keep: Sequence[Row]


@dataclass(frozen=True)
class Trial:
    """A name of `benchmark.adapters.FORMS` or BASE, and how it is trained. `seed`: of new tokens and data order."""

    form: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """Mean losses of a learnt token on held-out text and on the other text, None where the training diverged.

    `tokens_per_second`: learnt ones, without the first steps; None of the base.  `peak_bytes`: of a GPU.
    """

    parameters: int
    held: float | None
    keep: float | None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None


def read_texts(learn: str, keep: str, setting: Setting, tokenizer: Any) -> Texts:
    """Both texts; of the one that is learnt the last tenth of its examples is held out. DataError when that leaves
    nothing."""

    def packed(examples: Sequence[Example], most: int | None = None) -> Sequence[Row]:
        return pack(examples, setting.seq_length, seed=0)[:most]

    examples, others = (read_examples([file], tokenizer, setting.seq_length, drop_long=True) for file in (learn, keep))
    count = max(1, len(examples) // _HELD_OUT)
    if len(examples) <= count:
        raise DataError(f"{learn}: holds {len(examples)} example, and one is held out. Give more.")
    texts = Texts(
        packed(examples[:-count]), packed(examples[-count:], setting.measured), packed(others, setting.measured)
    )
    for file, rows in ((learn, texts.learn), (learn, texts.held), (keep, texts.keep)):
        if not count_targets(rows):
            raise DataError(f"{file}: nothing in it is to be learnt. Give answers, or texts.")
    return texts


def run_trial(setting: Setting, texts: Texts, trial: Trial, device: torch.device) -> Outcome:
    """Train and measure. This process is one of a group of one."""
    bf16 = setting.precision == "bf16"
    computing = Computing(device, 0, 1, bf16, setting.seq_length, setting.micro_batch, False)
    base = load_base(setting.base, torch.bfloat16 if bf16 else torch.float32).to(device)
    if trial.form == BASE:
        return Outcome(0, mean_loss(base, texts.held, computing), mean_loss(base, texts.keep, computing))
    torch.manual_seed(trial.seed)
    model = with_adapter(base, trial.form, setting.rank)
    parameters = trained_parameters(model)
    count = sum(parameter.numel() for parameter in parameters)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        speed = _train(setting, texts.learn, trial, model, computing)
    except TrainingError:
        return Outcome(count, None, None)
    held, keep = mean_loss(model, texts.held, computing), mean_loss(model, texts.keep, computing)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if not math.isfinite(held + keep):
        return Outcome(count, None, None, speed, peak)
    return Outcome(count, held, keep, speed, peak)


def _train(setting: Setting, learn: Sequence[Row], trial: Trial, model: Any, computing: Computing) -> float | None:
    """Tokens learnt a second; None where all steps are among the first."""
    section = AdamWOptimizer.model_validate(
        {"lr": trial.rate, "weight_decay": 0.0, "schedule": {"warmup_steps": setting.steps // _WARM_UP}}
    )
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters, betas=section.betas, eps=section.eps, weight_decay=0.0)
    seconds, tokens = 0.0, 0
    for step in range(setting.steps):
        began = time.perf_counter()
        rows = rows_of_step(learn, step, setting.batch, trial.seed)
        optimizer.zero_grad()
        _, norm = backward(model, rows, parameters, computing)
        if norm > _CLIPPING:
            torch._foreach_mul_([parameter.grad for parameter in parameters], _CLIPPING / norm)  # type: ignore[misc]
        for group in optimizer.param_groups:
            # the first update is one too: of a short trial, every step counts
            group["lr"] = learning_rate(step + 1, section, setting.steps + 1)
        optimizer.step()
        if step >= _UNTIMED:
            seconds += time.perf_counter() - began
            tokens += count_targets(rows)
    return tokens / seconds if seconds else None
