"""Saving a run: the content of a checkpoint, and the handling of failures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from copy import deepcopy
from pathlib import Path
from typing import Any

from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.manager import clear_leftovers, prune
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.config.optimizers import rule_of
from megatron_tf.engine.base import Engine
from megatron_tf.errors import CheckpointError
from megatron_tf.state.parameters import parameter_table
from megatron_tf.telemetry.trackers import Trackers
from megatron_tf.training.run_folder import folder_identity
from megatron_tf.training.running import Run
from megatron_tf.training.snapshot import StateCopier
from megatron_tf.training.start import Progress, checkpoints_folder


class Saver:
    """Writes checkpoints of one run, in the background unless told otherwise; never two at once.

    Training goes on as soon as `save` has noted what to copy: forward and backward do not touch the state that is
    saved, and the optimizer waits before its next update until the copy is complete.
    All ranks call each method together, at the same step.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        trackers: Trackers,
        *,
        token: str,
        data: Mapping[str, Any],
        growth_history: tuple[Mapping[str, Any], ...] = (),
        known_good: Collection[Path] = (),
    ):
        """`token`: random text, the same on all ranks.  `data`: fingerprint of the training data.

        `known_good`: checkpoints that this process has verified already. Removes the remains of killed saves.
        """
        self._run = run
        self._config = run.config
        self._engine = engine
        self._trackers = trackers
        self._token = token
        self._data = data
        self._history = growth_history
        self._sound = {path.resolve(): True for path in known_good}
        self._copier = StateCopier()
        self._copying: Future[list[Piece]] | None = None
        self._write: _Write | None = None
        self._failure: Exception | None = None  # of the newest save that is over
        self._reported: set[str] = set()
        if run.is_main:
            try:
                clear_leftovers(checkpoints_folder(run.config), report=self._report)
            except CheckpointError as error:
                self._report(str(error))

    def save(self, progress: Progress, run_state: Mapping[str, Any]) -> None:
        """Saves the present state. In the background it returns when copies of parameters have been compared, and only
        updates may change the state then.

        `run_state`: the further state that a resume needs, ready for JSON.
        Waits for the save before this one. CheckpointError when copies of a parameter differ.
        """
        self.finish()
        self._engine.check_replicas()
        pieces, index = self._engine.pieces(), self._index(progress, run_state)
        if not self._config.checkpoint.asynchronous:
            self._write = _Write(lambda: self._publish(pieces, index))
            self.finish()
            return
        copying = self._copying = self._copier.start(pieces)
        self._engine.before_update = self._await_copy
        self._write = _Write(lambda: self._publish(_when_copied(copying), index))

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes in the background."""
        return self._write is not None and self._write.is_alive()

    def finish(self) -> None:
        """Waits for the save in the background and reports it.

        A failed save is a warning and the run goes on, because its progress is worth more than an early end; with
        `checkpoint.on_failure: stop` it is a CheckpointError. Older checkpoints are not touched.
        """
        write, self._write = self._write, None
        if write is None:
            return
        write.join()
        self._await_copy()
        self._failure = write.failure
        if write.failure is None:
            self._run.console.info(f"saved {write.path}")
            return
        if not isinstance(write.failure, CheckpointError):
            raise write.failure
        if self._config.checkpoint.on_failure == "stop":
            raise write.failure
        if self._run.is_main:
            self._run.console.warning(f"checkpoint not saved: {write.failure}")

    def require(self, step: int) -> None:
        """At the end of a run: CheckpointError when its last save, of `step`, has failed."""
        if self._failure is not None:
            raise CheckpointError(
                f"the run ends after step {step:,}, but that state is not saved: {self._failure}. Correct this and "
                "start the run again: it repeats the steps since its newest checkpoint."
            )

    def _await_copy(self) -> None:
        """Waits until the state may change again. `finish` reports a copy that failed."""
        if self._copying is not None:
            wait([self._copying])
            self._copying = self._engine.before_update = None

    def _publish(self, pieces: Iterable[Piece], index: CheckpointIndex) -> Path:
        """Runs in the background: ranks meet through files only, see `checkpoint.writer`."""
        root, keep_last = checkpoints_folder(self._config), self._config.checkpoint.keep_last
        path = save_checkpoint(
            root,
            pieces,
            index,
            rank=self._run.rank,
            world_size=self._run.world_size,
            token=f"{self._token}-{index.step}",
            timeout_seconds=self._config.parallel.timeout_seconds,
        )
        if self._run.is_main and keep_last is not None:
            try:
                self._sound[path.resolve()] = True
                prune(root, keep_last, self._sound, self._report)
            except (OSError, CheckpointError) as error:
                self._report(f"old checkpoints in {root} could not be deleted: {error}")
        return path

    def _report(self, problem: str) -> None:
        """Warns of a problem once, although it occurs at each save."""
        if problem not in self._reported:
            self._reported.add(problem)
            self._run.console.warning(problem)

    def _index(self, progress: Progress, run_state: Mapping[str, Any]) -> CheckpointIndex:
        table, states = parameter_table(self._config.model), rule_of(self._config.optimizer).state_names
        return CheckpointIndex(
            step=progress.step,
            samples=progress.samples,
            tokens=progress.tokens,
            model=self._config.model.model_dump(mode="json"),
            scales=self._engine.scales,
            tensors=expected_tensors({name: spec.shape for name, spec in table.items()}, states),
            adam_steps=self._engine.adam_steps(),
            growth_history=self._history,
            data=self._data,
            trackers=self._trackers.ids,
            run={**deepcopy(dict(run_state)), **folder_identity(self._run.folder)},  # it is written later
        )


def _when_copied(copying: Future[list[Piece]]) -> Iterator[Piece]:
    """Yields the copies when they are complete. An error of copying is raised in the save, which tells all ranks."""
    yield from copying.result()


class _Write(threading.Thread):
    """One save in the background and its outcome. If the process dies meanwhile, no incomplete checkpoint is left."""

    def __init__(self, work: Callable[[], Path]):
        super().__init__(name="checkpoint", daemon=True)
        self._work = work
        self.path: Path | None = None
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.path = self._work()
        except Exception as error:  # raised again where all ranks are together
            self.failure = error
