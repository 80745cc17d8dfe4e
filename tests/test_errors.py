from __future__ import annotations

import io
import subprocess
import sys

import pytest

from megatron_tf.errors import CheckpointError, ConfigError, DataError, LaunchError, UserError, run_command


def fail_with(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_one_problem_is_the_message():
    error = ConfigError("model.num_layers: 0 must be at least 1.")
    assert error.problems == ["model.num_layers: 0 must be at least 1."]
    assert str(error) == "model.num_layers: 0 must be at least 1."


def test_all_problems_are_listed():
    error = ConfigError(("a.b: first.", "c.d: second."))
    assert error.problems == ["a.b: first.", "c.d: second."]
    assert str(error) == "2 problems in the configuration:\n  - a.b: first.\n  - c.d: second."


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError, LaunchError])
def test_a_user_error_is_one_message_and_exit_code_2(kind, capsys):
    assert issubclass(kind, UserError)
    with pytest.raises(SystemExit) as ended:
        run_command(fail_with(kind("data/x.bin: 3 bytes, not 4.")))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == "error: data/x.bin: 3 bytes, not 4.\n"
    assert printed.out == ""


def test_a_bug_keeps_its_traceback():
    for bug in (AssertionError("ours"), RuntimeError("ours"), FileNotFoundError("ours")):
        with pytest.raises(type(bug), match="ours"):
            run_command(fail_with(bug))


def test_control_c_is_exit_code_130(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(fail_with(KeyboardInterrupt()))
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_success_returns():
    ran = []
    run_command(lambda: ran.append("main"))
    assert ran == ["main"]


def test_exit_codes_of_the_command_are_kept():
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: sys.exit(3))
    assert ended.value.code == 3


@pytest.mark.parametrize("lines", [3, 100_000], ids=["noticed when flushing", "noticed when printing"])
def test_a_reader_that_closes_the_pipe(lines):
    """As in `tool | head -1`: no traceback, neither from `print` nor from the interpreter's shutdown."""
    script = f"""
import sys
from megatron_tf.errors import run_command
def main():
    sys.stdin.readline()  # until the reader is gone
    for at in range({lines}):
        print("line", at)
run_command(main)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert isinstance(child.stdout, io.TextIOWrapper)
    child.stdout.close()
    _, err = child.communicate("go\n", timeout=60)
    assert (child.returncode, err) == (1, "")
