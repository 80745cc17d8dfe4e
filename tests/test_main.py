"""Commands by name, in a Python that does not have everything."""

from __future__ import annotations

import subprocess
import sys

import pytest
from launching import PROJECT, environment
from live import PATIENCE_SECONDS

from megatron_tf.__main__ import Command, start
from megatron_tf.errors import UserError

PREPROCESS = ["preprocess", "--input", "a.txt", "--tokenizer", "bytes", "--output-prefix", "b"]


@pytest.mark.parametrize("words", [["launch/train.py", "configs/tiny.yml"], ["-m", "megatron_tf", *PREPROCESS]])
def test_a_python_without_the_packages_is_a_users_mistake(words):
    """Exit code 2, so that no scheduler tries it again. -S: only the standard library."""
    done = subprocess.run(
        [sys.executable, "-S", *words], cwd=PROJECT, env=environment(PYTHONPATH=str(PROJECT)), text=True,
        timeout=PATIENCE_SECONDS, capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith(f"error: this Python, {sys.executable} (") and ", has no package " in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_module_of_our_own_that_is_missing_stays_a_bug():
    with pytest.raises(ModuleNotFoundError):
        start(Command("no_such_command", "none"))


def test_a_package_that_a_command_finds_missing_later(monkeypatch):
    def main():
        import no_such_package.part  # noqa: F401

    monkeypatch.setattr("megatron_tf.commands.plan_run.main", main)
    with pytest.raises(UserError, match="has no package no_such_package"):
        start(Command("plan_run", "none"))
