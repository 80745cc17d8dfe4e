"""A check that all ranks see one run folder. On local disks of nodes the parts of a checkpoint would be scattered."""

from __future__ import annotations

import secrets
import socket
import time
from contextlib import suppress
from pathlib import Path

from megatron_tf.checkpoint.kinds import CHECKPOINTS_FOLDER
from megatron_tf.checkpoint.manager import UNFINISHED_PREFIX
from megatron_tf.errors import ConfigError, write_remedy
from megatron_tf.runtime.agreement import from_rank_zero, together

# A network file system shows a new file to other nodes within this.
PATIENCE_SECONDS = 30.0
PAUSE_SECONDS = 0.1


def check_shared(run_dir: Path, is_main: bool, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """ConfigError, on all ranks, when one of them does not see a file that rank 0 writes into the run's folder.

    Leaves nothing behind. If the folder does not exist yet, its nearest parent is used.
    """
    mark = Path(from_rank_zero(lambda: str(_leave_mark(run_dir))))
    try:
        together(lambda: _see(mark, run_dir, patience_seconds))
    finally:
        if is_main:
            with suppress(OSError):
                mark.unlink()


def _leave_mark(run_dir: Path) -> Path:
    wanted = run_dir.absolute() / CHECKPOINTS_FOLDER
    folder = next(place for place in (wanted, *wanted.parents) if place.is_dir())
    mark = folder / f"{UNFINISHED_PREFIX}seen-by-all-{secrets.token_hex(4)}"
    try:
        mark.touch()
    except OSError as error:
        remedy = write_remedy(error, "Choose another folder.")
        raise ConfigError(f"run.dir: cannot write to {folder}: {error.strerror}. {remedy}") from error
    return mark


def _see(mark: Path, run_dir: Path, patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    while not mark.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run.dir: {run_dir} on {socket.gethostname()} is not the folder of rank 0, whose file {mark} is not "
                "there. Choose a folder that all nodes share."
            )
        time.sleep(PAUSE_SECONDS)
