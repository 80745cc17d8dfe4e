import os
import signal
import sys
from collections import Counter
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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """With several workers (pytest -n), a file is one worker's, and so are all tests on SLURM, and all that compare
    speeds.

    Those that take longest are given out first, so that no worker has a long one left when the others are done.
    """
    if not config.pluginmanager.hasplugin("xdist") or not getattr(config, "workerinput", None):
        return
    seconds = Counter()
    groups = {}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        folder, _, _ = item.nodeid.partition("/test_")
        group = (
            "timing" if "timing" in marks else "slurm" if folder.endswith("slurm") else item.nodeid.partition("::")[0]
        )
        item.add_marker(pytest.mark.xdist_group(group))
        groups[item] = group
        seconds[group] += 100 if "scale" in marks else 30 if "slow" in marks else 1
    items.sort(key=lambda item: -seconds[groups[item]])


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
