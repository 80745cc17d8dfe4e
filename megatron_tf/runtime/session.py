"""The session of a rank: from joining the others to leaving them, under a watchdog."""

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
    """Context of the work of ranks that have joined; yields the watchdog. At its end they leave torch.distributed.

    `hang_seconds`: see `Watchdog`.
    """
    try:
        with watched(
            environment.rank, environment.world_size, hang_seconds, Console(rank=environment.rank)
        ) as watchdog:
            yield watchdog
    except LostContactError:
        # A rank is gone, and leaving in order could wait for it for ever.
        raise
    except (UserError, RunStopped):
        # All ranks raise these. After any other error some may be in a collective, and leaving would hang.
        leave()
        raise
    leave()
