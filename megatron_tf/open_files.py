"""The limit of open files of a process: raising it as far as the system allows, and the remedy when it is too low."""

from __future__ import annotations

import errno
import resource

# Far more than a blend has sources. Some containers allow a billion, and programs that start others loop over all of
# them to close them.
MOST = 65_536


def raise_limit() -> None:
    """Raise the soft limit of this process, and of those it starts, to the hard limit, but to `MOST` at most.

    Login shells set the soft limit to 1,024; the hard limit is usually far higher.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):
        # macOS reports no hard limit, but refuses numbers above an internal one.
        return


def too_many(error: BaseException | None) -> bool:
    """Whether `error` says that too many files are open. Opening any other file would then fail as well."""
    return isinstance(error, OSError) and remedy(error) is not None


def remedy(error: OSError) -> str | None:
    """A sentence with the remedy if `error` says that too many files are open; None if it says something else."""
    if error.errno == errno.ENFILE:
        return "All processes of this machine together have too many files open: end some, or raise fs.file-max."
    if error.errno != errno.EMFILE:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        f"This process may have {limit:,} files open. Allow more where it is started (`ulimit -n {MOST}`, in a "
        f"container `--ulimit nofile={MOST}`, in a service LimitNOFILE={MOST}), or give it fewer sources or files."
    )
