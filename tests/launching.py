"""Starting the project's own commands the way users do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]
TRAIN = str(PROJECT / "launch" / "train.py")
EVALUATE = str(PROJECT / "launch" / "evaluate.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**extra) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    kept = {k: v for k, v in os.environ.items() if k in ("HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "LANG")}
    return {**kept, **own, **extra}


def run(command, **extra) -> subprocess.CompletedProcess:
    """Runs a command; what it printed is in stdout (both streams together)."""
    return subprocess.run(
        list(map(str, command)), env=environment(**extra), cwd=PROJECT, text=True, timeout=200,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


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
