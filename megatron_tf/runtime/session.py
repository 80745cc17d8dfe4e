"""The session of a rank between joining and leaving the others, with a watchdog, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_tf.errors import LostContactError, RunStopped, UserError
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.joining import leave
from megatron_tf.runtime.watchdog import Watchdog, watched
from megatron_tf.telemetry.console import Console


@contextmanager
def session(environment: LaunchEnvironment, hang_seconds: float) -> Iterator[Watchdog]:
    """The block is the work of ranks that have joined, under a watchdog. After it they leave torch.distributed."""
    try:
        with watched(
            environment.rank, environment.world_size, hang_seconds, Console(rank=environment.rank)
        ) as watchdog:
            yield watchdog
    except LostContactError:
        # A rank is gone, and to leave the others in order could take for ever.
        raise
    except (UserError, RunStopped):
        # All ranks are here. After any other error some may be in a collective, and waiting would hang.
        leave()
        raise
    leave()
