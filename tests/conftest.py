import os
import signal
import sys
from pathlib import Path

import pytest
import torch

# Triton's kernels are tested in its interpreter where they cannot be compiled; it looks when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell has its jobs in the background ignore Control-C, and what they start as well; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tests share `distributed.py`; spawned ranks must find it as well
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def config():
    """config(section={...}) is the small run of `tiny.py` with these changes."""
    from tiny import run_config

    return run_config


@pytest.fixture(autouse=True)
def environment_variables_stay():
    """What a test, or a library that it imports, puts into the environment ends with the test."""
    before = dict(os.environ)
    yield
    # pytest's own, which it changes and removes itself
    for name in (before.keys() | os.environ.keys()) - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]
