"""A trial: an adapter is trained on one text, or on a second one after it, and losses are measured on these texts and
on another one."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tf.adapters.folder import write_adapter
from megatron_tf.adapters.growth import grow_adapter
from megatron_tf.adapters.loading import load_base
from megatron_tf.benchmark.adapters import APPENDED, LORA, add_lora, trained_parameters, with_adapter
from megatron_tf.engine.schedule import learning_rate
from megatron_tf.errors import DataError, TrainingError
from megatron_tf.finetuning.batches import Row, count_targets, pack, rows_from
from megatron_tf.finetuning.examples import Example, read_examples
from megatron_tf.finetuning.steps import Computing, backward, mean_loss
from megatron_tf.optimizers.adamw import AdamWOptimizer

BASE = "none"  # the base alone
# the ways to train on the second text: name -> (form of the adapter, label in tables)
SECOND = {
    "lora-on": (LORA, "LoRA, trained on"),
    "lora-second": (LORA, "LoRA, frozen, and a second one"),
    "modules-on": ("modules", "Pattention, trained on"),
    "modules-grown": ("modules", "Pattention, frozen, grown by as many tokens"),
    "appended-on": (APPENDED, "appended tokens, trained on"),
    "appended-grown": (APPENDED, "appended tokens, frozen, and as many more"),
}
_HELD_OUT = 10  # the last tenth of the examples is not trained on
_WARM_UP = 10  # the first tenth of the steps
_CLIPPING = 1.0
_UNTIMED = 2  # the first steps, because they allocate memory


@dataclass(frozen=True)
class Setting:
    """The setting that all trials share.

    `precision`: "bf16" or "fp32".  `rank`: of LoRA; the other forms get as many parameters.  `batch`: sequences of a
    step, computed `micro_batch` at a time.  `seq_length`: [tokens].  `measured`: the most sequences that a loss is
    measured on.  `packing`: whether a sequence holds several examples.
    """

    base: Path
    precision: str
    rank: int
    steps: int
    batch: int
    micro_batch: int
    seq_length: int
    measured: int
    packing: bool = True

    @property
    def length(self) -> int | None:
        """The tokens of each sequence; None when each is as long as its example."""
        return self.seq_length if self.packing else None


@dataclass(frozen=True)
class Texts:
    """Sequences. `learn`: to train on.  `held`: held out of the same text.  `keep`: of the text that may be forgotten.
    `then`, `then_held`: of the second text, empty without one."""

    learn: Sequence[Row]
    held: Sequence[Row]
    keep: Sequence[Row]
    then: Sequence[Row] = ()
    then_held: Sequence[Row] = ()


@dataclass(frozen=True)
class Trial:
    """`form`: a name of `benchmark.adapters.FORMS` or SECOND, or BASE.  `rate`: learning rate.  `seed`: of new tokens
    and the data order."""

    form: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """`parameters`: trained ones.  `held`, `keep`: mean loss a learnt token on held-out text and on the other text;
    None when the training diverged.  `tokens_per_second`: learnt, without the first steps; None for the base alone.
    `peak_bytes`: of GPU memory.  In a trial of SECOND, `held` is of the second text and `first` of the first.
    """

    parameters: int
    held: float | None
    keep: float | None
    tokens_per_second: float | None = None
    peak_bytes: int | None = None
    first: float | None = None


def read_texts(learn: str, keep: str, then: str | None, setting: Setting, tokenizer: Any) -> Texts:
    """All texts. The last tenth of the examples of a text to learn is held out. DataError when nothing is left."""

    def packed(file: str, examples: Sequence[Example], most: int | None = None) -> Sequence[Row]:
        rows: Sequence[Row] = [[one] for one in examples][:most]
        if setting.packing:
            rows = pack(examples, setting.seq_length, seed=0)[:most]
        if not count_targets(rows):
            raise DataError(f"{file}: nothing in it is to be learnt. Give answers, or texts.")
        return rows

    def read(file: str) -> list[Example]:
        return read_examples([file], tokenizer, setting.seq_length, drop_long=True, key="--seq-length")

    def parted(file: str) -> tuple[Sequence[Row], Sequence[Row]]:
        examples = read(file)
        count = max(1, len(examples) // _HELD_OUT)
        if len(examples) <= count:
            raise DataError(f"{file}: holds {len(examples)} example, and one is held out. Give more.")
        return packed(file, examples[:-count]), packed(file, examples[-count:], setting.measured)

    second = parted(then) if then else ((), ())
    return Texts(*parted(learn), packed(keep, read(keep), setting.measured), *second)


def run_trial(setting: Setting, texts: Texts, trial: Trial, device: torch.device) -> Outcome:
    """Train and measure, in this process alone. torch.distributed must be set up with a group of size 1."""
    bf16 = setting.precision == "bf16"
    computing = Computing(device, 0, 1, bf16, setting.length, setting.micro_batch, False)
    base = load_base(setting.base, torch.bfloat16 if bf16 else torch.float32).to(device)
    if trial.form == BASE:
        return Outcome(0, mean_loss(base, texts.held, computing), mean_loss(base, texts.keep, computing))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    torch.manual_seed(trial.seed)
    is_second = trial.form in SECOND
    model = with_adapter(base, SECOND[trial.form][0] if is_second else trial.form, setting.rank)
    try:
        speed = _train(setting, texts.learn, trial, model, computing)
        if is_second:
            model = _prepared(setting, trial, model, device)
            speed = _train(setting, texts.then, trial, model, computing)
    except TrainingError:
        return Outcome(_size(model), None, None)
    held, keep = (
        mean_loss(model, rows, computing) for rows in (texts.then_held if is_second else texts.held, texts.keep)
    )
    first = mean_loss(model, texts.held, computing) if is_second else None
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    if not math.isfinite(held + keep):
        return Outcome(_size(model), None, None, speed, peak)
    return Outcome(_size(model), held, keep, speed, peak, first)


def _prepared(setting: Setting, trial: Trial, model: Any, device: torch.device) -> Any:
    """The model after the first text, prepared for the second one as `trial` says."""
    if trial.form == "lora-second":
        add_lora(model, setting.rank)
    if not trial.form.endswith("-grown"):
        return model
    from megatron_tf.adapters.tuner import adapter_of, with_adapters

    trained = adapter_of(model)
    grown = grow_adapter(trained, 2 * trained.config["num_tokens"], freeze_old=True, seed=trial.seed)
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder) / "grown", grown)
        return with_adapters(
            load_base(setting.base, dtype).to(device), {"default": Path(folder) / "grown"}, trained=True
        )


def _size(model: Any) -> int:
    return sum(parameter.numel() for parameter in trained_parameters(model))


def _train(setting: Setting, learn: Sequence[Row], trial: Trial, model: Any, computing: Computing) -> float | None:
    """Trains `model` in place. Returns learnt tokens a second; None when there are only untimed steps."""
    section = AdamWOptimizer.model_validate(
        {"lr": trial.rate, "weight_decay": 0.0, "schedule": {"warmup_steps": setting.steps // _WARM_UP}}
    )
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters, betas=section.betas, eps=section.eps, weight_decay=0.0)
    seconds, tokens = 0.0, 0
    for step in range(setting.steps):
        began = time.perf_counter()
        rows = rows_from(learn, step * setting.batch, setting.batch, trial.seed)
        optimizer.zero_grad()
        _, norm = backward(model, rows, parameters, computing)
        if norm > _CLIPPING:
            torch._foreach_mul_([parameter.grad for parameter in parameters], _CLIPPING / norm)  # type: ignore[misc]
        for group in optimizer.param_groups:
            # Shifted by one step, so that neither the first nor the last rate is 0: in a short trial every step counts.
            group["lr"] = learning_rate(step + 1, section, setting.steps + 1)
        optimizer.step()
        if step >= _UNTIMED:
            seconds += time.perf_counter() - began
            tokens += count_targets(rows)
    return tokens / seconds if seconds else None
