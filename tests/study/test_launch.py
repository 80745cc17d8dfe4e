"""The exit code of a run of several processes is that of the process that failed first."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_tf.errors import STOPPED_EXIT_CODE

PROGRAM = """
import os, signal, sys, time
if os.environ["RANK"] == "1" and {code} != 0:
    time.sleep(60)
if {code} < 0:
    os.kill(os.getpid(), -{code})
sys.exit({code})
"""


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (STOPPED_EXIT_CODE, STOPPED_EXIT_CODE), (-9, 137)])
def test_exit_code(tmp_path, code, expected):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(code=code), "utf-8")
    command = [sys.executable, "-m", "megatron_tf.study.launch", "--standalone", "--nproc-per-node", "2", str(program)]
    assert subprocess.run(command, capture_output=True, timeout=50).returncode == expected
