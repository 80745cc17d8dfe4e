import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_tf.runtime import local_ranks

# Triton's kernels are tested in its interpreter where they cannot be compiled; it looks when it is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# torch's compiler would start helpers, each of which imports torch, for kernels that are compiled in no time.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# A shell has its jobs in the background ignore Ctrl-C, and what they start as well; tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# tests share `distributed.py`; spawned ranks must find it as well
sys.path.insert(0, str(Path(__file__).parent))

from warm_server import OF_RANKS  # noqa: E402

# Ranks are forked from a process that has imported what each of them would import anew, for some tenths of a second.
local_ranks.IMPORTS += OF_RANKS


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several workers (pytest -n), a file is one worker's, and so are all tests on SLURM."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return worker_group(nodeid)

    return ByFile(config, log)


def pytest_collection_modifyitems(config, items):
    """Workers are given first what takes longest, so that none has a long file left when the others are done."""
    if not hasattr(config, "workerinput"):
        return
    seconds = Counter()
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        seconds[worker_group(item.nodeid)] += 100 if "scale" in marks else 30 if "slow" in marks else 1
    items.sort(key=lambda item: -seconds[worker_group(item.nodeid)])


def worker_group(nodeid):
    """What a test is kept together with."""
    file, _, _ = nodeid.partition("::")
    return "tests/slurm" if file.startswith("tests/slurm/") else file


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
