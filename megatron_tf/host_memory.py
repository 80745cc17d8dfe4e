"""How this process gets its memory from the system."""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory() -> None:
    """Freed memory is kept for what is allocated next; without it each large tensor is new pages, filled with zeros first.

    On a CPU that is a tenth of a step. The process stays as large as it once was. Where malloc is not glibc's or has no
    such settings, nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)
