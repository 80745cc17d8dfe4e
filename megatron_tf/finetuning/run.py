"""A fine-tuning run, from its configuration to an adapter: data-parallel over all ranks, resumed where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_tf.adapters.folder import read_adapter
from megatron_tf.adapters.loading import load_base, load_tokenizer
from megatron_tf.adapters.modules import default_kinds
from megatron_tf.adapters.summary import PUBLISHED, trained_adapter
from megatron_tf.config.run_plan import below_trained
from megatron_tf.durable import atomic_path
from megatron_tf.engine.schedule import learning_rate
from megatron_tf.errors import CheckpointError, ConfigError, DataError, RunStopped, file_errors
from megatron_tf.finetuning.batches import Row, count_targets, pack, rows_from
from megatron_tf.finetuning.examples import read_examples
from megatron_tf.finetuning.packed import check_length, check_packing
from megatron_tf.finetuning.saving import (
    Progress,
    Resumed,
    checkpoints,
    delete_old,
    publish_adapter,
    read_progress,
    save,
    whole_moments,
)
from megatron_tf.finetuning.section import FinetuneConfig, check_ranks, dump_finetune
from megatron_tf.finetuning.sharding import part_like, shard
from megatron_tf.finetuning.steps import Computing, backward, mean_loss
from megatron_tf.optimizers.adamw import as_adamw
from megatron_tf.runtime.agreement import from_rank_zero, together
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import join_ranks
from megatron_tf.runtime.run_folder import RunFolder
from megatron_tf.runtime.session import session
from megatron_tf.runtime.stop_signals import StopSignals, describe_request
from megatron_tf.runtime.watchdog import Watchdog
from megatron_tf.telemetry.console import Console
from megatron_tf.telemetry.text import count_of
from megatron_tf.telemetry.trackers import Trackers, open_trackers

DEFAULT_TOKENS = 64
_CHECKPOINTS = "checkpoints"


def finetune(config: FinetuneConfig, environment: LaunchEnvironment, stop: StopSignals) -> None:
    """Train, evaluate and save as `config` says. RunStopped, on every rank, after a stop that `stop` asked for; before
    anything is written, UserError for what the user can correct."""
    check_ranks(config, environment.world_size)
    device = join_ranks(environment, config.run.timeout_seconds, facts={"the configuration": dump_finetune(config)})
    with session(environment, config.run.hang_seconds) as watchdog, contextlib.ExitStack() as closing:
        path, is_main = Path(config.run.dir), environment.rank == 0
        watchdog.begin("reading the examples")
        tokenizer = together(lambda: load_tokenizer(Path(config.base.path)))
        train, validation = together(lambda: _read(config, tokenizer))
        digest = together(lambda: _digest(config.data.train))
        watchdog.begin("loading the base")
        folder = together(lambda: RunFolder(path, closing) if is_main else None)
        newest = from_rank_zero(lambda: next(reversed(checkpoints(path / _CHECKPOINTS)), None))
        model, resumed = together(lambda: _model(config, newest, digest))
        together(lambda: _place(config, model, device))
        together(lambda: _prepare(folder, config) if folder else None)
        console = Console(rank=environment.rank, log_path=path / "train.log")
        watchdog.report_to(console, path)
        computing = Computing(device, environment.rank, environment.world_size, config.base.precision == "bf16",
                              config.data.seq_length if config.data.packing else None,
                              config.training.micro_batch_size, config.parallel.shard is not None)  # fmt: skip
        ids = resumed.progress.trackers if resumed else {}
        step = resumed.progress.step if resumed else 0
        trackers = together(lambda: open_trackers(config, path, step, ids, is_main, console.warning))
        closing.callback(trackers.close)
        for place in trackers.places:
            console.info(f"{'tracker':<7} {place}")
        run = _Finetuning(config, model, resumed, train, validation, digest, computing, console, trackers)
        run.fit(stop, watchdog)


class _Finetuning:
    """The steps of one run."""

    def __init__(
        self,
        config: FinetuneConfig,
        model: Any,
        resumed: Resumed | None,
        train: list[Row],
        validation: list[Row],
        data: str,
        computing: Computing,
        console: Console,
        trackers: Trackers,
    ):
        self.config, self.model, self.train, self.validation = config, model, train, validation
        self.computing, self.console, self.trackers = computing, console, trackers
        self.folder = Path(config.run.dir)
        self.progress = resumed.progress if resumed else Progress(0, data, rows=0)
        if self.progress.rows is None:
            rows = self.progress.step * config.training.global_batch_size
            self.progress = replace(self.progress, rows=rows)
        self.names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        settings = as_adamw(config.optimizer)
        self.optimizer = torch.optim.AdamW(
            list(self.names), lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
        if resumed:
            _restore(self.optimizer, self.names, resumed)
        self.is_main = computing.rank == 0

    @property
    def step(self) -> int:
        """Updates so far."""
        return self.progress.step

    def fit(self, stop: StopSignals, watchdog: Watchdog) -> None:
        steps = self.config.training.train_steps
        learnt = count_targets(self.train)
        self.console.info(f"{'data':<7} {count_of(len(self.train), 'sequence')}, {learnt:,} learnt tokens an epoch")
        if self.step > steps and self.is_main:
            self.console.warning(below_trained("training.train_steps", steps, self.step))
        trained = sum(parameter.numel() for parameter in self.names)
        self.console.info(f"{'adapter':<7} {trained:,} trained parameters; step {self.step:,} of {steps:,}")
        # The base is frozen and needs no dropout, so evaluation mode would do. But transformers recomputes layers in
        # training mode only.
        self.model.train(self.config.training.activation_checkpointing)
        began, tokens = time.monotonic(), 0
        with stop.saving(self.is_main):
            while self.step < steps:
                tokens += self._step(watchdog)
                if self.step % self.config.logging.interval_steps == 0 or self.step == steps:
                    seconds = time.monotonic() - began
                    self._log({"speed/learnt_tokens_per_second": tokens / seconds})
                    began, tokens = time.monotonic(), 0
                if self.validation and (self.step % self.config.evaluation.interval_steps == 0 or self.step == steps):
                    with watchdog.during("evaluating"):
                        loss = mean_loss(self.model, self.validation, self.computing)
                    self.last = {"eval/loss": loss}
                    self._log({})
                request = self._agreed(stop.request(self.config.run.max_hours))
                interval = self.config.checkpoint.interval_steps
                if request or self.step == steps or (interval and self.step % interval == 0):
                    with watchdog.during("saving"):
                        self._save()
                if request and self.step < steps:
                    raise RunStopped(f"stopped at step {self.step:,}, because {describe_request(request)}; saved")
        with watchdog.during("saving"):
            self._publish()
        self.console.info(f"complete: {self.folder / PUBLISHED}")

    def _step(self, watchdog: Watchdog) -> int:
        """One update. Returns the number of tokens that it learnt."""
        training = self.config.training
        rate = learning_rate(self.step, self.config.optimizer, training.train_steps)
        rows = rows_from(self.train, self.progress.rows or 0, training.global_batch_size, self.config.run.seed)
        self.optimizer.zero_grad()
        loss, norm = backward(self.model, rows, list(self.names), self.computing)
        if training.gradient_clipping and norm > training.gradient_clipping:
            for parameter in self.names:
                assert parameter.grad is not None
                parameter.grad *= training.gradient_clipping / norm
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        learnt = count_targets(rows)
        now = self.progress
        self.progress = replace(now, step=now.step + 1, tokens=now.tokens + learnt, rows=(now.rows or 0) + len(rows))
        watchdog.beat(self.step)
        self.last = {"train/loss": loss, "train/gradient_norm": norm, "train/learning_rate": rate}
        return learnt

    def _log(self, more: dict[str, float]) -> None:
        values = {**self.last, **more}
        text = "  ".join(f"{name.rpartition('/')[2].replace('_', ' ')} {value:.5g}" for name, value in values.items())
        kind = "eval " if "eval/loss" in values else ""
        self.console.info(f"step {self.step:,}  {kind}{text}")
        self.trackers.log({"tokens": self.progress.tokens, **values}, self.step)

    def _agreed(self, request: int) -> int:
        """The largest `request` of all ranks, so that all of them stop when one is asked to."""
        found = torch.tensor(request, device=self.computing.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def _save(self) -> None:
        from megatron_tf.adapters.tuner import adapter_of

        adapter, moments = adapter_of(self.model), whole_moments(self.optimizer, self.names)

        def write() -> Path:
            place = self.folder / _CHECKPOINTS
            progress = replace(self.progress, trackers=self.trackers.ids)
            path = save(place, progress, adapter, moments)
            delete_old(place, self.config.checkpoint.keep_last)
            return path

        self.console.info(f"saved {from_rank_zero(write)}")

    def _publish(self) -> None:
        from megatron_tf.adapters.tuner import adapter_of

        adapter = adapter_of(self.model)
        from_rank_zero(lambda: publish_adapter(self.folder / PUBLISHED, adapter))


def _read(config: FinetuneConfig, tokenizer: Any) -> tuple[list[Row], list[Row]]:
    data = config.data
    found: list[list[Row]] = []
    for files in (data.train, data.validation):
        examples = read_examples(files, tokenizer, data.seq_length, data.too_long == "drop") if files else []
        rows: list[Row] = [[one] for one in examples]
        if data.packing:
            rows = pack(examples, data.seq_length, config.run.seed)
        if files and not count_targets(rows):
            raise DataError(f"{', '.join(files)}: nothing in it is to be learnt. Give answers.")
        found.append(rows)
    return found[0], found[1]


def _digest(files: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file_errors(DataError, file, "Give a readable file."), open(file, "rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _model(config: FinetuneConfig, newest: Path | None, data: str) -> tuple[Any, Resumed | None]:
    """(The base with the adapter to train, the state to resume from or None)."""
    from megatron_tf.adapters.tuner import with_adapters, with_new_adapter

    adapter, resumed = config.adapter, None
    if newest is not None:
        stored, resumed = read_adapter(newest).config, read_progress(newest)
        if resumed.progress.data != data:
            raise ConfigError(
                f"data.train: the files are not those that {newest} was trained on. Give these, or another run.dir."
            )
        if adapter.tokens not in (None, stored["num_tokens"]):
            raise ConfigError(
                f"adapter.tokens: {adapter.tokens}, and {newest} has {stored['num_tokens']}. Give another run.dir, or "
                "grow the adapter and set adapter.from."
            )
        if adapter.modules and sorted(adapter.modules) != sorted(stored["modules"]):
            raise ConfigError(
                f"adapter.modules: {', '.join(adapter.modules)}, and {newest} has {', '.join(stored['modules'])}. "
                "Restore them, or give another run.dir."
            )
    base = load_base(Path(config.base.path), torch.bfloat16 if config.base.precision == "bf16" else torch.float32)
    check_length(base, config.data.seq_length, "data.seq_length")
    torch.manual_seed(config.run.seed)
    source = newest or (trained_adapter(Path(adapter.source)) if adapter.source else None)
    if source is not None:
        read_adapter(source)
        model = with_adapters(base, {"default": source}, trained=True)
    else:
        model = with_new_adapter(base, adapter.tokens or DEFAULT_TOKENS, adapter.modules or default_kinds(base))
    return model, resumed


def _place(config: FinetuneConfig, model: Any, device: torch.device) -> None:
    """Moves the model, or this rank's part of it, to the device, and then makes the checks that need it there."""
    if config.parallel.shard:
        shard(model, device)
    else:
        model.to(device)
    if config.data.packing:
        check_packing(model, device, "data.packing", "Set data.packing to false.")
    if config.training.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _restore(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], resumed: Resumed) -> None:
    for parameter, name in names.items():
        state = {kind: tensors.get(name) for kind, tensors in resumed.moments.items()}
        if any(tensor is None or tensor.shape != parameter.shape for tensor in state.values()):
            raise CheckpointError(f"the checkpoint has no moments of {name}. Remove it to go on from an older one")
        moments = {kind: part_like(tensor, parameter) for kind, tensor in state.items() if tensor is not None}
        optimizer.state[parameter] = {"step": torch.tensor(float(resumed.progress.step)), **moments}


def _prepare(folder: RunFolder, config: FinetuneConfig) -> None:
    """Makes the folder and writes the configuration."""
    place = folder.path / _CHECKPOINTS
    folder.make(place, lambda: bool(checkpoints(place)))
    with folder.writing(), atomic_path(folder.path / "config.yml") as partial:
        partial.write_text(dump_finetune(config), encoding="utf-8")
