"""Saving a run: what goes into a checkpoint, and what happens when it cannot be written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from megatron_tf.checkpoint.format import CheckpointIndex, expected_tensors
from megatron_tf.checkpoint.manager import prune
from megatron_tf.checkpoint.writer import save_checkpoint
from megatron_tf.config.schema import RunConfig
from megatron_tf.errors import CheckpointError
from megatron_tf.params import parameter_table
from megatron_tf.telemetry.console import Console
from megatron_tf.telemetry.trackers import Trackers
from megatron_tf.training.engine import Engine
from megatron_tf.training.start import Progress, checkpoints_folder


class Saver:
    """Writes checkpoints of one run. All ranks call `save` together."""

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
        self.saved_step = -1

    def save(self, progress: Progress) -> None:
        """Publishes a checkpoint of `progress`, then lets old ones go.

        A save that fails is a warning and the run goes on: what it has learnt is worth more than a tidy end,
        and the older checkpoints are untouched. CheckpointError when copies of a parameter have drifted apart.
        """
        self._engine.check_replicas()
        try:
            path = save_checkpoint(
                checkpoints_folder(self._config), self._engine.pieces(), self._index(progress),
                rank=self._rank, world_size=self._world_size, token=f"{self._token}-{progress.step}",
                timeout_seconds=self._config.parallel.timeout_seconds,
            )  # fmt: skip
        except CheckpointError as error:
            self._console.warning(f"checkpoint not saved, training goes on: {error}")
            return
        self.saved_step = progress.step
        self._console.info(f"saved {path}")
        if self._rank == 0 and self._config.checkpoint.keep_last is not None:
            prune(checkpoints_folder(self._config), self._config.checkpoint.keep_last, known_good=[path])
        dist.barrier()

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
