"""Joining the ranks of a run that DeepSpeed trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import NO_FACTS, join_ranks


def join(
    environment: LaunchEnvironment,
    timeout_seconds: float,
    store_file: str | None = None,
    facts: Mapping[str, str] = NO_FACTS,
) -> torch.device:
    """Calls `join_ranks` and initialises DeepSpeed's communication on it. Returns this rank's device."""
    device = join_ranks(environment, timeout_seconds, store_file, facts)
    from megatron_tf.engine.deepspeed.patches import attach

    attach()
    return device
