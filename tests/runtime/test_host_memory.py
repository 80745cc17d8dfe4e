"""A process that keeps freed memory soon takes no new pages; one that wants more memory than is free is told so."""

from __future__ import annotations

import subprocess
import sys

from live import PATIENCE_SECONDS

CODE = """
import resource, sys
import torch
from megatron_tf.runtime.host_memory import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(12):  # until malloc's caches of small pieces, which come between, are full: 7 of a size
    new_pages()
print(new_pages())
"""


def pages_of_another_tensor(way):
    done = subprocess.run(
        [sys.executable, "-c", CODE, way], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True
    )
    return int(done.stdout)


def test_memory_is_reused():
    assert pages_of_another_tensor("keep") < 100
    assert pages_of_another_tensor("return") >= 32  # huge ones at the least: 64 MiB


def test_the_users_own_settings_stay(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert pages_of_another_tensor("keep") >= 32


def test_more_than_is_free_is_an_error():
    code = """
import os
import torch
from megatron_tf.runtime.host_memory import refuse_beyond_free

refuse_beyond_free()
torch.empty(1 << 28).fill_(1.0)  # a GiB is there
try:
    torch.empty(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), dtype=torch.uint8)
except RuntimeError as error:
    print("allocate memory" in str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True
    )
    assert done.stdout == "True\n"
