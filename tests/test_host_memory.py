"""A process that keeps freed memory takes no new pages for the next tensor."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import resource, sys
import torch
from megatron_tf.host_memory import keep_freed_memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "keep":
    keep_freed_memory()
new_pages()
print(new_pages())
"""


def pages_of_the_second_tensor(way):
    done = subprocess.run([sys.executable, "-c", CODE, way], capture_output=True, text=True, timeout=60, check=True)
    return int(done.stdout)


def test_memory_is_reused():
    assert pages_of_the_second_tensor("keep") < 100
    assert pages_of_the_second_tensor("return") >= 32  # huge ones at the least: 64 MiB
