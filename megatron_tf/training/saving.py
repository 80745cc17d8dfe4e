"""Saving a run: what goes into a checkpoint, and what happens when it cannot be written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.manager import prune
from megatron_tf.checkpoint.writer import Piece, save_checkpoint
from megatron_tf.config.schema import RunConfig
from megatron_tf.errors import CheckpointError
from megatron_tf.params import parameter_table
from megatron_tf.telemetry.console import Console
from megatron_tf.telemetry.trackers import Trackers
from megatron_tf.training.engine import Engine
from megatron_tf.training.start import Progress, checkpoints_folder


class Saver:
    """Writes checkpoints of one run, in the background unless told otherwise; never two at once.

    All ranks call each method together, at the same step.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        rank: int,
        world_size: int,
        token: str,
        data_fingerprint: Mapping[str, Any],
        growth_history: tuple[Mapping[str, Any], ...],
        trackers: Trackers,
        console: Console,
    ):
        self._config, self._engine, self._rank, self._world_size = config, engine, rank, world_size
        self._token, self._data, self._history = token, data_fingerprint, growth_history
        self._trackers, self._console = trackers, console
        self._buffers: dict[str, Tensor] = {}
        self._write: _Write | None = None
        self._group = dist.new_group(backend="gloo")  # for asking about a write without stopping a GPU

    def save(self, progress: Progress) -> None:
        """Saves the state as it is now. Returns when a copy of it is safe to write from, which is soon.

        Waits for the save before this one. CheckpointError when copies of a parameter have drifted apart.
        """
        self.finish()
        self._engine.check_replicas()
        asynchronous = self._config.checkpoint.asynchronous
        pieces = self._snapshot() if asynchronous else self._engine.pieces()
        index = self._index(progress)
        self._write = _Write(lambda: self._publish(pieces, index))
        if not asynchronous:
            self.finish()

    def poll(self) -> None:
        """Reports a background save once it is over on all ranks; to be called at every step. Never waits for it."""
        if self._write is None:
            return
        over = torch.tensor(int(not self._write.is_alive()))
        dist.all_reduce(over, op=dist.ReduceOp.MIN, group=self._group)
        if over:
            self.finish()

    def finish(self) -> None:
        """Waits for the save in the background and reports it.

        A save that failed is a warning and the run goes on, because what it has learnt since is worth more than a
        tidy end; with `checkpoint.on_failure: stop` it is a CheckpointError. Older checkpoints are untouched.
        """
        write, self._write = self._write, None
        if write is None:
            return
        write.join()
        if write.failure is None:
            self._console.info(f"saved {write.path}")
            return
        if not isinstance(write.failure, CheckpointError):
            raise write.failure
        if self._config.checkpoint.on_failure == "stop":
            raise write.failure
        if self._rank == 0:
            self._console.warning(f"checkpoint not saved, training goes on: {write.failure}")

    def _publish(self, pieces: list[Piece], index: CheckpointIndex) -> Path:
        """Runs in the background: ranks meet through files only, see `checkpoint.writer`."""
        root, keep_last = checkpoints_folder(self._config), self._config.checkpoint.keep_last
        path = save_checkpoint(
            root, pieces, index, rank=self._rank, world_size=self._world_size, token=f"{self._token}-{index.step}",
            timeout_seconds=self._config.parallel.timeout_seconds,
        )  # fmt: skip
        if self._rank == 0 and keep_last is not None:
            try:
                prune(root, keep_last, known_good=[path])
            except OSError as error:
                self._console.warning(f"old checkpoints in {root} could not be deleted: {error}")
        return path

    def _snapshot(self) -> list[Piece]:
        """A copy of this rank's state in CPU memory that is allocated once."""
        pieces = []
        for piece in self._engine.pieces():
            buffer = self._buffers.get(piece.key)
            if buffer is None:
                buffer = torch.empty(piece.tensor.shape, dtype=piece.tensor.dtype, pin_memory=piece.tensor.is_cuda)
                self._buffers[piece.key] = buffer
            buffer.copy_(piece.tensor, non_blocking=True)
            pieces.append(replace(piece, tensor=buffer))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return pieces

    def _index(self, progress: Progress) -> CheckpointIndex:
        table = parameter_table(self._config.model)
        return CheckpointIndex(
            step=progress.step,
            samples=progress.samples,
            tokens=progress.tokens,
            model=self._config.model.model_dump(mode="json"),
            scales=self._engine.scales,
            tensors=expected_tensors({name: spec.shape for name, spec in table.items()}),
            adam_steps=self._engine.adam_steps(),
            growth_history=self._history,
            data=self._data,
            trackers=self._trackers.ids,
            run=self._engine.loss_scaler(),
        )


class _Write(threading.Thread):
    """One save in the background and how it ended. A process that dies meanwhile leaves nothing half-written behind."""

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
