"""Settings of this process's memory: keep what is freed, and refuse what the machine does not have."""

from __future__ import annotations

import ctypes
import os
import resource

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory() -> None:
    """Stops glibc from returning freed memory to the system; otherwise every large tensor costs page faults.

    The process stays as large as it once was. Nothing changes where malloc is not glibc's, or where the environment has
    settings for it (MALLOC_..., GLIBC_TUNABLES).
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)


def refuse_beyond_free() -> None:
    """Makes allocations fail with an error when they take this process beyond the memory that is free now.

    Otherwise the system would grant them and kill the process when the memory is used. Nothing changes where Linux does
    not report free memory.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
        with open("/proc/self/statm", encoding="ascii") as file:
            held = int(file.read().split()[5]) * resource.getpagesize()  # data and stacks, as the limit counts them
    except (OSError, StopIteration):
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [1024 * kilobytes + held, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
