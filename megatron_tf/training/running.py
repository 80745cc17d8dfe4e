"""The run on this rank, which every part of training is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tf.config.run_plan import RunPlan
from megatron_tf.config.schema import RunConfig
from megatron_tf.telemetry.console import Console


@dataclass(frozen=True)
class Run:
    """One run on one rank; no step changes it.

    `config`: the one in effect, see `account`.  `plan`: from the first step of this process on.
    """

    config: RunConfig
    plan: RunPlan
    rank: int
    device: torch.device
    console: Console

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def world_size(self) -> int:
        return self.plan.topology.world_size

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files and log lines of which there is one."""
        return self.rank == 0
