"""Allows one run at a time in a folder: two would overwrite each other's checkpoints.

What a run reads of its folder to decide how it begins, it reads while it has the lock. A run that makes its folder
takes the lock later, and looks then whether another one has begun meanwhile.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_tf.durable import take_lock
from megatron_tf.errors import ConfigError

LOCK_NAME = "run.lock"
PATIENCE_SECONDS = 10.0


def begun_meanwhile(run_dir: Path) -> ConfigError:
    """The error of a run that was to make its folder and finds checkpoints there when it has the lock."""
    return ConfigError(
        f"run.dir: another run has begun in {run_dir} while this one started, and has saved. Start this one again to "
        "go on from there, or choose another run.dir."
    )


@contextlib.contextmanager
def run_folder_lock(run_dir: Path, patience_seconds: float = PATIENCE_SECONDS, key: str = "run.dir") -> Iterator[None]:
    """Hold the folder's lock; the system frees it when the process ends, however it ends.

    A run that was killed just now may take a moment to be gone, so this waits `patience_seconds` before it raises a
    ConfigError that names the process that holds the lock. On a file system without locks it holds nothing.
    `key`: with which the user named the folder.
    """
    path = run_dir / LOCK_NAME
    with open(path, "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + patience_seconds
        while not take_lock(file.fileno()):
            if time.monotonic() >= deadline:
                file.seek(0)
                raise ConfigError(
                    f"{key}: {run_dir} is in use by {file.read().strip() or 'another run'}. "
                    f"Stop that run, or choose another {key}."
                )
            time.sleep(0.1)
        file.truncate(0)
        now = datetime.datetime.now().isoformat(" ", "seconds")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
        file.flush()
        yield
