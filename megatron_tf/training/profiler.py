"""Traces of chosen steps, for a person to look at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_tf.config.sections.training import Profile
from megatron_tf.engine.step_clock import StepClock
from megatron_tf.telemetry.console import Console


class StepProfiler:
    """Records the steps that `config` names with torch's profiler, and writes one trace a rank when they are done."""

    def __init__(self, config: Profile | None, rank: int, folder: Path, clock: StepClock, console: Console):
        self._config = config if config is not None and (rank == 0 or config.all_ranks) else None
        self._rank = rank
        self._folder = folder
        self._clock = clock
        self._console = console
        self._running: profile | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Step `number`, counted from 1 as in the log. A run that resumes beyond the first one records nothing."""
        config = self._config
        if config is not None and number == config.first_step:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._running = profile(activities=activities, record_shapes=True)
            self._running.start()
            self._clock.names_ranges = True
        yield
        if config is not None and number == config.first_step + config.num_steps - 1:
            self.finish()

    def finish(self) -> None:
        """Ends a recording that is under way, complete or not, and writes it. A file that fails is only a warning."""
        running, self._running = self._running, None
        if running is None or self._config is None:
            return
        running.stop()
        self._clock.names_ranges = False
        path = self._folder / f"step{self._config.first_step}-rank{self._rank}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            self._console.warning(f"the profile could not be written to {path}: {error}")
        else:
            self._console.info(f"profile: {path} (open it in Perfetto or chrome://tracing)")
