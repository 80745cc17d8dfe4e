from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from megatron_tf.errors import ConfigError
from megatron_tf.runtime.run_folder import RunFolder, run_folder_lock

HOLD = """
import sys, time
from pathlib import Path
from megatron_tf.runtime.run_folder import run_folder_lock
with run_folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_runs_in_one_folder(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        message = f"run.dir: .* is in use by process {other.pid} on "
        with pytest.raises(ConfigError, match=message), run_folder_lock(tmp_path, patience_seconds=0.2):
            pass
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with run_folder_lock(tmp_path, patience_seconds=5):  # the killed run does not block the next one
        pass
    with run_folder_lock(tmp_path, patience_seconds=0):
        pass


def is_locked(folder):
    try:
        with run_folder_lock(folder, patience_seconds=0.0):
            return False
    except ConfigError:
        return True


def test_a_folder_that_exists_is_locked_at_once_and_a_new_one_when_it_is_made(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    with contextlib.ExitStack() as closing:
        RunFolder(old, closing)
        assert is_locked(old)
        folder = RunFolder(new, closing)
        assert not new.exists()
        folder.make(new / "checkpoints", lambda: False)
        # the first save makes the folder of checkpoints
        assert is_locked(new) and [path.name for path in new.iterdir()] == ["run.lock"]
    assert not is_locked(old) and not is_locked(new)


def test_whether_another_run_has_begun_is_asked_of_a_new_folder_alone(tmp_path):
    with contextlib.ExitStack() as closing:
        RunFolder(tmp_path, closing).make(tmp_path / "checkpoints", lambda: True)
    with contextlib.ExitStack() as closing, pytest.raises(ConfigError, match="^run.dir: another run has begun in "):
        RunFolder(tmp_path / "new", closing).make(tmp_path / "new" / "checkpoints", lambda: True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with contextlib.ExitStack() as closing:
        folder = RunFolder(tmp_path / "file" / "run", closing)
        with pytest.raises(ConfigError, match=r"run\.dir: .* cannot be made: .*file is a file\. Choose another folder"):
            folder.make(tmp_path / "file" / "run" / "checkpoints", lambda: False)
