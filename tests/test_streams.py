"""Commands with standard streams that are closed, on a full disk, or without a reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from live import PATIENCE_SECONDS

PROJECT = Path(__file__).parents[1]
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")


def shell(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in `folder`, where `run` is the command megatron_tf."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", **variables}
    head = f'set -o pipefail; run() {{ "{sys.executable}" -m megatron_tf "$@"; }}\n'
    return subprocess.run(
        ["bash", "-c", head + command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )


@pytest.mark.parametrize(("command", "code"), [
    ("run config list >&-", 0),
    ("run config list <&- >&- 2>&-", 0),
    ("run nonsense >&- 2>&-", 2),
    ("run plan none.yml --gpus 1 2>&-", 2),
    pytest.param("run nonsense 2>/dev/full", 2, marks=needs_full),
    pytest.param("run config list >/dev/full 2>/dev/full", 2, marks=needs_full),
    ("run config show tiny --help | head -1", 0),
    ("{ sleep 0.3; run config list; } | true", 1),
    ("run plan tiny --gpus 1 --gpu", 2),
])  # fmt: skip
def test_exit_codes_do_not_depend_on_who_listens(tmp_path, command, code):
    done = shell(command, tmp_path)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_a_copy_is_exact_where_the_locale_lacks_characters(tmp_path):
    done = shell("run config show transformer_124M >copy.yml", tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy.yml").read_bytes() == (PROJECT / "configs" / "transformer_124M.yml").read_bytes()


SCRIPT = """
import json, os, subprocess, sys
from megatron_tf.errors import run_command
def main():
    print("out"), print("err", file=sys.stderr)
    with open("data", "w") as file:
        number = file.fileno()
        file.write("data")
        os.write(1, b"a library prints"), os.write(2, b"this as well")
        subprocess.run(["sh", "-c", "echo a child prints; echo so it does >&2; cat"])
    open("found", "w").write(json.dumps([number, open("data").read(), sys.stdin.read()]))
run_command(main)
"""


def test_what_is_printed_to_closed_streams_gets_into_no_file(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = shell(f'"{sys.executable}" script.py <&- >&- 2>&-', tmp_path)
    assert done.returncode == 0
    number, data, read = json.loads((tmp_path / "found").read_text())
    assert number > 2 and (data, read) == ("data", "")


@needs_full
def test_progress_that_cannot_be_shown_stops_no_work(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    command = "run preprocess --input a.txt --tokenizer bytes --output-prefix"
    done = shell(f"{command} one 2>/dev/full >&- && {command} two --workers 2 <&- >&- 2>&-", tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()


def test_a_report_without_a_reader_is_no_error(tmp_path):
    body = "from megatron_tf.streams import report; import time; time.sleep(0.5); report('a'); report('b')"
    done = shell(
        f"""'{sys.executable}' -c "from megatron_tf.errors import run_command
def main():
    {body}
run_command(main)" | true""",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
