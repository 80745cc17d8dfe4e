"""Starting tools as users do, on good days and on a full disk."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

from live import PATIENCE_SECONDS
from warm_server import hugging_face, warm_python

PROJECT = Path(__file__).parents[1]


def tool(
    name: str, *arguments: object, largest_file: int | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """tools/NAME.py; with `largest_file` no file may grow beyond so many bytes, which a full disk looks like."""

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    # Triton's interpreter is for the tests in this process.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    extra = {"PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **hugging_face(),
             **variables}  # fmt: skip
    command = [str(warm_python() / "python"), str(PROJECT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(
        command, env={**kept, **extra}, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
        preexec_fn=limit,  # noqa: PLW1509 - no thread runs here
    )  # fmt: skip


def assert_refused(done: subprocess.CompletedProcess, *fragments: object) -> None:
    """One message with all of `fragments`, exit code 2, nothing on stdout."""
    assert (done.returncode, done.stdout) == (2, ""), done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr, done.stderr
    for fragment in fragments:
        assert str(fragment) in done.stderr, done.stderr
