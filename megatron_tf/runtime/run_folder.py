"""The folder of a run, with one run at a time: two would overwrite each other's checkpoints."""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_tf.durable import check_writable, take_lock, write_atomically
from megatron_tf.errors import ConfigError, write_errors

LOCK_NAME = "run.lock"
PATIENCE_SECONDS = 10.0


class RunFolder:
    """The folder of a run, on the rank that writes there: locked until `closing` ends.

    One that exists is locked at once: another process might write a newer checkpoint there while this run chooses its
    start. A new one is made and locked when the start is certain. ConfigError, here and there, for what the user can
    correct.
    """

    def __init__(self, path: Path, closing: contextlib.ExitStack, patience_seconds: float = PATIENCE_SECONDS):
        self.path = path
        self._closing = closing
        self._patience_seconds = patience_seconds
        self._is_locked = path.is_dir()
        if self._is_locked:
            self._lock()

    def make(self, checkpoints: Path, has_begun: Callable[[], bool]) -> None:
        """Makes it, and checks that its folder of `checkpoints` can be written, before hours are spent.

        One that is not there yet is left to the first save, so that a run that ends before it leaves none behind. It
        can be made where the lock and the configuration are written.
        `has_begun`: whether a run has saved there, asked of a new folder only.
        """
        if not self._is_locked:
            check_writable(ConfigError, self.path, "Choose another folder.", "run.dir")
            with self.writing():
                self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._is_locked = True
            if has_begun():
                raise ConfigError(
                    f"run.dir: another run has begun in {self.path} while this one started, and has saved. Start this "
                    "one again to go on from there, or choose another run.dir."
                )
        if os.path.lexists(checkpoints):
            with self.writing():
                attempt = checkpoints / f".tmp-can-write-{secrets.token_hex(4)}"
                write_atomically(attempt, b"checkpoints can be written here")
                attempt.unlink()

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """For a block that writes in it."""
        return write_errors(ConfigError, self.path, "Choose another run.dir.")

    def _lock(self) -> None:
        with self.writing():
            self._closing.enter_context(run_folder_lock(self.path, self._patience_seconds))


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
