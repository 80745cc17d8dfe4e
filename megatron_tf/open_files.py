"""How many files a process may have open: raised as far as the system allows, and what to do when that is too few."""

from __future__ import annotations

import errno
import resource

# Far more than any blend has sources. Some containers allow a billion, over which programs loop when they start others.
MOST = 65_536


def raise_limit() -> None:
    """Let this process and those that it starts have as many files open as they may, `MOST` at most.

    Login shells allow 1,024 of them, and the system many more on request.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        # macOS says that there is no limit and refuses numbers above one of its own.
        return


def too_many(error: BaseException | None) -> bool:
    """Whether `error` says that too many files are open, as opening any other would say again."""
    return isinstance(error, OSError) and remedy(error) is not None


def remedy(error: OSError) -> str | None:
    """What helps when `error` says that too many files are open; None when it says something else."""
    if error.errno == errno.ENFILE:
        return "All processes of this machine together have too many files open: end some, or raise fs.file-max."
    if error.errno != errno.EMFILE:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"This process may have {limit:,} files open. Allow more where it is started (`ulimit -n {MOST}`, in a "
        f"container `--ulimit nofile={MOST}`, in a service LimitNOFILE={MOST}), or give it fewer sources or files."
    )
