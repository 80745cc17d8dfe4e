from __future__ import annotations

import runpy
import subprocess

import pytest
from tooling import PROJECT


@pytest.fixture
def here(monkeypatch, capsys):
    """`tool` in this process, for tables of cases: one of its own takes a second."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
        script = str(PROJECT / "tools" / f"{name}.py")
        monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(script, code, printed.out, printed.err)

    return run
