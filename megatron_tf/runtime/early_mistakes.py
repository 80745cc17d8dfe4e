"""Reports a user's mistake that a rank finds before the ranks meet, and that perhaps no other rank finds. Imports torch
only then."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_tf.errors import LaunchError, UserError
from megatron_tf.runtime.environment import LaunchEnvironment
from megatron_tf.runtime.stop_signals import end_at_signals

# Rank 0 may still be importing; a launcher ends this rank sooner when rank 0 has made the same mistake.
PATIENCE_SECONDS = 60.0
# By then rank 0 has read the reason and printed it.
SAYING_SECONDS = 3.0


@contextmanager
def told_to_all(environment: LaunchEnvironment, patience_seconds: float = PATIENCE_SECONDS) -> Iterator[None]:
    """A UserError in the block ends the meeting of the other ranks, which would wait for this one: rank 0 reports it.

    This rank then exits with code 2. If rank 0 cannot be reached within `patience_seconds`, this rank reports the
    mistake itself, as a LaunchError with its number and host.
    """
    try:
        yield
    except UserError as error:
        if environment.rank == 0:
            raise
        # If rank 0 made the same mistake, the launcher stops all ranks, and may have begun: exit with its code then.
        end_at_signals(2)
        reason = f"rank {environment.rank} ({socket.gethostname()}): {error}"
        if _told(environment, reason, patience_seconds):
            time.sleep(SAYING_SECONDS)  # a launcher ends rank 0 with this one
            sys.exit(2)
        raise LaunchError(reason) from error


def _told(environment: LaunchEnvironment, reason: str, patience_seconds: float) -> bool:
    from megatron_tf.runtime.patient_store import Unreachable
    from megatron_tf.runtime.rendezvous import Assembly, open_store

    try:
        store = open_store(environment, patience_seconds)
        return Assembly(store, environment.rank, environment.world_size, patience_seconds).call_off(
            environment.run, reason
        )
    except (LaunchError, Unreachable):
        return False
