from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from megatron_tf.errors import ConfigError
from megatron_tf.runtime.run_lock import run_folder_lock

HOLD = """
import sys, time
from pathlib import Path
from megatron_tf.runtime.run_lock import run_folder_lock
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
