"""The training loop: every line a verb."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_tf.checkpoint.manager import BEFORE_DECAY
from megatron_tf.config.tasks import task_of
from megatron_tf.costs.estimate import flops_per_token
from megatron_tf.data.loader import source_names
from megatron_tf.data.prefetch import Prefetcher
from megatron_tf.engine.base import Engine, StepResult
from megatron_tf.engine.schedule import decay_step
from megatron_tf.engine.step_clock import describe_shares
from megatron_tf.errors import RunStopped
from megatron_tf.runtime.stop_signals import StopSignals, describe_request
from megatron_tf.runtime.watchdog import TRAINING, Watchdog
from megatron_tf.tasks.data import Batch, Loader
from megatron_tf.telemetry.meters import MeanMeter, ThroughputMeter, format_duration
from megatron_tf.telemetry.records import DIVERGED
from megatron_tf.telemetry.trackers import Trackers
from megatron_tf.training.account import run_settings
from megatron_tf.training.early_stop import EarlyStop
from megatron_tf.training.guard import LossGuard
from megatron_tf.training.health import HealthProbe, health_probe, in_words
from megatron_tf.training.profiler import StepProfiler
from megatron_tf.training.run_data import Loaders
from megatron_tf.training.running import Run
from megatron_tf.training.samples import sample_texts
from megatron_tf.training.saving import Saver
from megatron_tf.training.start import Progress, Start
from megatron_tf.training.step_metrics import StepMetrics


class Trainer:
    """Runs the steps of one run from `progress` to the end of its plan."""

    def __init__(
        self,
        run: Run,
        engine: Engine,
        loaders: Loaders,
        start: Start,
        saver: Saver,
        trackers: Trackers,
        stop: StopSignals,
        watchdog: Watchdog,
    ):
        self.run = run
        self.config = run.config
        self.plan = run.plan.batches
        self.console = run.console
        self.engine = engine
        self.data = loaders.data
        self.validation = loaders.validation
        self.saver = saver
        self.trackers = trackers
        self.stop = stop
        self.watchdog = watchdog
        self.progress = start.progress
        self.logged_step = start.progress.step
        self.earlier_tokens = start.earlier_tokens
        self.earlier_flops = start.earlier_flops(run.config.model)
        self.history = list(start.run_state.get("history", ()))
        keeps = run.config.checkpoint.keep_before_decay
        self.decay_step = decay_step(run.config.optimizer.schedule, self.plan) if keeps else None
        self.guard = LossGuard(run.config.guard, start.run_state.get("guard", {}))
        self.early_stop = EarlyStop(run.config.training.stop_when, start.run_state.get("early_stop", {}))
        self.losses = MeanMeter(start.run_state.get("loss_window"))
        self.meter = ThroughputMeter()
        # over gloo, so that the small all-reduce between steps does not wait for the GPU
        self.meeting = dist.new_group(backend="gloo")
        self.metrics = StepMetrics(run.config, self.plan, run.device, self.meeting)
        self.health = health_probe(run, engine.stage, loaders.data, start.old_tokens)
        self.samples = sample_texts(run, engine.stage)
        self.profiler = StepProfiler(
            run.config.training.profile, run.rank, run.folder / "profile", engine.clock, run.console
        )
        # seconds that this rank waited for the data of the newest step
        self.waited = 0.0
        self.training: Loader | Prefetcher = loaders.training
        if engine.reads_data:
            self.training = Prefetcher(loaders.training, self.plan.global_batch_size, run.device)

    def close(self) -> None:
        """Ends reading ahead and profiling, while the time limit of a step still holds."""
        if isinstance(self.training, Prefetcher):
            self.training.close()
        self.profiler.finish()
        self.watchdog.begin("ending")

    def fit(self) -> None:
        """Trains until the plan's last step. If the run is complete already, it only says so.

        RunStopped, after a save, if any rank was asked to stop or the time is up.
        """
        config = self.config
        if self._finished():
            because = f", because {self.early_stop.reason}" if self.early_stop.reason else ""
            self.console.info(f"step {self.progress.step:,} of {self.plan.train_steps:,}: the run is complete{because}")
            return
        if self.progress.step == 0:
            self._evaluate()
        self.meter.start()
        self.watchdog.begin(TRAINING)  # without a time limit: the first step may compile, or wait for slow storage
        with (
            self.stop.saving(is_main=self.run.is_main),
            self.console.progress(self.plan.train_steps, self.progress.step, config.run.name) as bar,
        ):
            while not self._finished():
                result = self._train_step()
                self._check(result)
                request = self._meet()
                self.watchdog.beat(self.progress.step)
                if self._due(config.logging.interval_steps):
                    bar.advance(self.progress.step, self._log(result))
                if self.health is not None and self._due(config.logging.health_interval_steps):
                    self._measure_health(self.health)
                if self._due(config.evaluation.interval_steps):
                    self._watch(self._evaluate())
                if self._finished():
                    self.guard.check_end(self.progress.step, result.loss_scale)
                due = self._due(config.checkpoint.interval_steps) or self._finished()
                if (due and not self.guard.is_skipping) or request or self._before_decay():
                    self._save()
                if request and not self._finished():
                    self._end_early(request)
            self._finish_saving()
        self.saver.require(self.progress.step)

    def note_divergence(self) -> None:
        """Writes into the run's records that it has ended by diverging."""
        self._record({DIVERGED: 1})

    def _meet(self) -> int:
        """One small all-reduce (max) a step: stop request, save still running, seconds that the step waited for data.
        Returns the stop request."""
        word = torch.tensor(
            [self.stop.request(self.config.run.max_hours), self.saver.is_writing, self.waited], dtype=torch.float64
        )
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.meeting)
        request, writing, waited = word.tolist()
        self.meter.waited(waited)
        if not writing:
            self.saver.finish()
        return int(request)

    def _end_early(self, request: int) -> NoReturn:
        self._finish_saving()
        self.saver.require(self.progress.step)
        raise RunStopped(
            f"stopped after step {self.progress.step:,} of {self.plan.train_steps:,}, because "
            f"{describe_request(request)}. That step is saved: start the run again to go on."
        )

    def _before_decay(self) -> bool:
        return self.progress.step == self.decay_step

    def _finished(self) -> bool:
        return self.progress.step >= self.plan.train_steps or self.early_stop.reason is not None

    def _watch(self, loss: float | None) -> None:
        """Notes the validation loss, which may end the run; not after a skipped step, whose state is suspect."""
        if loss is None or self.guard.is_skipping:
            return
        self.early_stop.watch(loss)
        if self.early_stop.reason and self.progress.step < self.plan.train_steps:
            self.console.info(f"step {self.progress.step:,}: the run ends here, because {self.early_stop.reason}")

    def _due(self, interval: int | None, step: int | None = None) -> bool:
        """Whether an action with this interval is due after `step` (default: the last step done)."""
        step = self.progress.step if step is None else step
        return step >= self.plan.train_steps or (interval is not None and step % interval == 0)

    def _train_step(self) -> StepResult:
        now = self.progress
        logged = self._due(self.config.logging.interval_steps, now.step + 1)
        with self.profiler.step(now.step + 1), self.engine.clock.step(measured=logged):
            batches = self._next_batches()
            result = self.engine.train_step(now.step, batches, self.guard.lr_factor)
        self.progress = Progress(
            now.step + 1, now.samples + self.plan.global_batch_size, now.tokens + self.plan.tokens_per_step
        )
        return result

    def _next_batches(self) -> Iterator[Batch]:
        began = time.perf_counter()
        with self.engine.clock.phase("data"):
            batches = self.training.step_batches(self.progress.samples)
        self.waited = time.perf_counter() - began
        return batches

    def _check(self, result: StepResult) -> None:
        """Warns of a bad step; DivergedError when the run must stop."""
        step, said = self.progress.step, None
        self.losses.add(float(result.loss))
        if result.seeks_scale:
            self.guard.overflowed()
            return
        if result.skipped:
            where = ", ".join(self.engine.nonfinite_gradients()[:3])
            said = self.guard.skipped(
                step,
                f"loss {float(result.loss):g}, gradient not finite" + (f", first in {where}" if where else ""),
                result.loss_scale,
            )
        else:
            said = self.guard.watch(step, float(result.loss))
        if said and self.run.is_main:  # all ranks would say the same
            self.console.warning(said)

    def _log(self, result: StepResult) -> str:
        steps = self.progress.step - self.logged_step
        self.logged_step = self.progress.step
        own = float(result.loss)  # waits for the device, so that the lap below is complete
        mean = self.losses.take()
        loss = own if mean is None else mean
        norm = None if result.grad_norm is None else float(result.grad_norm)
        rates = self.meter.lap(steps, steps * self.plan.tokens_per_step)
        shares, left = self.engine.clock.shares(), self.plan.train_steps - self.progress.step
        self._record(self.metrics.training(result, loss, self.engine.steps_skipped, rates, shares, left))
        text = f"loss {loss:.4f}  " + ("" if norm is None else f"norm {norm:.3f}  ")
        if result.seeks_scale:
            text += f"skipped, loss scale {result.loss_scale:g}  "
        task, model = task_of(self.config.model), self.config.model
        text += f"lr {result.lr:.2e}  {task.in_units(model, rates.tokens_per_second):,.0f} {task.unit}/s"
        eta, where = format_duration(left * rates.step_seconds), f"  ({describe_shares(shares)})"
        self.console.info(f"step {self.progress.step:,}/{self.plan.train_steps:,}  {text}  left {eta}{where}")
        return text

    def _evaluate(self) -> float | None:
        """Mean loss over the same validation samples each time, whatever the layout; None without such data."""
        if self.validation is None:
            return None
        with self.meter.paused(), self.watchdog.during("evaluating"):
            size, names = self.plan.global_batch_size, source_names(self.config.data.validation)
            firsts = range(0, self.config.evaluation.samples, size)
            sources = [source for first in firsts for source in self.validation.sample_sources(first)]
            batches = (batch for first in firsts for batch in self.validation.step_batches(first))
            loss, by_source, measured = self.engine.evaluate_groups(batches, sources, len(names))
            of_sources = {f"eval/loss/{name}": mean for name, mean in zip(names, by_source) if mean is not None}
            found = self.metrics.validation(loss, measured)
            self._record({**found, **(of_sources if len(names) > 1 else {})})
            words = task_of(self.config.model).in_words(loss, measured)
            self.console.info(f"step {self.progress.step:,}  validation {words}")
            if self.samples is not None:
                texts = self.samples.write()
                self._record({f"sample/{number}": text for number, text in enumerate(texts, 1)})
                for text in texts:
                    self.console.info(f"step {self.progress.step:,}  writes  {text!r}")
            return loss

    def _measure_health(self, health: HealthProbe) -> None:
        with self.meter.paused(), self.watchdog.during("measuring health"):
            found = health.measure()
        self._record(found)
        for line in in_words(found):
            self.console.info(f"step {self.progress.step:,}  {line}")

    def _save(self) -> None:
        with self.meter.paused(), self.watchdog.during("saving"):
            self.saver.save(self.progress, self._run_state())

    def _finish_saving(self) -> None:
        with self.watchdog.during("saving"):
            self.saver.finish()

    def _run_state(self) -> dict:
        """The state of the run besides weights and moments, for a resume; see `Start`."""
        unit = round(self.plan.tokens_per_step / self.plan.schedule_pace)
        states = {
            "guard": self.guard.state(),
            "loss_window": self.losses.state(),
            "early_stop": self.early_stop.state(),
        }
        story: dict = {"settings": run_settings(self.config, self.run.world_size), "history": self.history}
        if self._before_decay():
            story[BEFORE_DECAY] = True
        return {**self.engine.loss_scaler(), **states, **story, "schedule_unit": unit}

    def _record(self, metrics: dict) -> None:
        tokens = self.progress.tokens
        flops = self.earlier_flops + (tokens - self.earlier_tokens) * flops_per_token(self.config.model)
        epoch = self.data.epoch(self.progress.samples) if self.run.is_main else None
        counted = {"tokens": tokens, "flops": flops, **({} if epoch is None else {"epoch": epoch})}
        self.trackers.log({**counted, **metrics}, self.progress.step)
