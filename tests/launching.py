"""Starting the project's own commands the way users do."""

from __future__ import annotations

import functools
import itertools
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from live import PATIENCE_SECONDS
from warm_server import hugging_face, warm_python

PROJECT = Path(__file__).parents[1]
TRAIN = str(PROJECT / "launch" / "train.py")
EVALUATE = str(PROJECT / "launch" / "evaluate.py")


@functools.cache
def _ports() -> Iterator[int]:
    """Each of a thousand ports in turn, in random order."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + 1_000 * (worker % 12)
    return itertools.cycle(random.sample(range(first, first + 1_000), 1_000))


def free_port() -> int:
    """A port that nobody listens on, and that no earlier call has given to what may be about to listen. Workers of
    pytest choose from a thousand of their own, below those that systems give to connections."""
    for port in itertools.islice(_ports(), 1_000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("the thousand ports of this worker are all taken")


def environment(**extra) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    kept = {k: v for k, v in os.environ.items() if k in ("HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "LANG")}
    return {**kept, **own, **hugging_face(), **extra}


def run(command, fresh=False, **extra) -> subprocess.CompletedProcess:
    """Runs a command; what it printed is in stdout (both streams together).

    Python and the launchers come from `warm_server`, unless the test is about starting: `fresh`.
    """
    words = list(map(str, command)) if fresh else warm(command)
    return subprocess.run(
        words, env=environment(**extra), cwd=PROJECT, text=True, timeout=PATIENCE_SECONDS,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def start_warm(monkeypatch) -> None:
    """Has the Pythons that this process itself starts during a test come from `warm_server`."""
    monkeypatch.setattr(sys, "executable", str(warm_python() / "python"))
    # Triton's interpreter is for the tests in this process.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in hugging_face().items():
        monkeypatch.setenv(name, value)


def warm(command) -> list[str]:
    """`command`, with a Python or a launcher that has already imported what takes seconds."""
    head, *words = map(str, command)
    name = "python" if head == sys.executable else head
    return [str(warm_python() / name) if name in ("python", "torchrun", "deepspeed") else head, *words]


def at_work(pid: int) -> int:
    """The process for which the warm one of this number stands; what stops or kills means that one."""
    return int((warm_python() / f"socket.{pid}").read_text())


def train(folder, *overrides, ranks=0, launcher="torchrun", **extra) -> subprocess.CompletedProcess:
    """launch/train.py on the folder's config; 0 ranks is plain python."""
    return run([*_launcher(launcher, ranks), TRAIN, folder / "config.yml", *overrides], **extra)


def evaluate(folder, *arguments, ranks=0, launcher="torchrun", **extra) -> subprocess.CompletedProcess:
    """launch/evaluate.py, likewise."""
    return run([*_launcher(launcher, ranks), EVALUATE, folder / "config.yml", *arguments], **extra)


def _launcher(name: str, ranks: int) -> list:
    heads = {
        "torchrun": ["torchrun", "--nproc-per-node", ranks, "--master-port", free_port()],
        "deepspeed": ["deepspeed", "--num_accelerators", ranks, "--master_port", free_port()],
    }
    return heads[name] if ranks else [sys.executable]
