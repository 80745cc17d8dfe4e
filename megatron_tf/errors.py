"""Exceptions for errors that a user can correct. Commands print them as one message and exit with code 2.

A message names the key or file, both numbers, and the remedy. Our own bugs stay plain exceptions (`assert`,
`RuntimeError`), so that a traceback always means a bug and never a user's mistake.
"""

from __future__ import annotations

import errno
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from megatron_tf import open_files
from megatron_tf.interrupt import (
    INTERRUPTED_EXIT_CODE,
    TERMINATED_EXIT_CODE,
    Terminated,
    end_by_exception,
    terminated_by_exception,
)
from megatron_tf.streams import discard, flush_or_discard, prepare_streams

# Error numbers that only a disk can cause, never our code. When a write fails, they come without a file name.
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})


# Errors of reading a JSON file that is not as it was written: it is incomplete, nests deeper than Python reads, or has
# other fields, types, lengths or sizes than expected.
NOT_AS_WRITTEN = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError)

STOPPED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
LOST_EXIT_CODE = 69  # EX_UNAVAILABLE of sysexits.h: not the user's mistake, and another start may well succeed


MESSAGE_LIMIT = 2_000  # characters: a value from a file must not make a message of any length


class UserError(Exception):
    """Base class of all errors that the user can correct.

    `limit`: most characters of the message; a longer one is printed without its middle.
    """

    limit = MESSAGE_LIMIT

    def __str__(self) -> str:
        return shortened(printable(super().__str__()), self.limit)


class ConfigError(UserError):
    """One or more problems in a run configuration, reported together.

    `problems`: each of the form "section.field: what is wrong. Remedy."
    """

    limit = 10 * MESSAGE_LIMIT

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        count = len(self.problems)
        head = "" if count == 1 else f"{count} problems in the configuration:\n  - "
        super().__init__(head + "\n  - ".join(map(shortened, self.problems)))


def raise_if_any(problems: Iterable[str]) -> None:
    """Raise one ConfigError with all of `problems`, unless there are none."""
    found = list(problems)
    if found:
        raise ConfigError(found)


class ArgumentError(UserError, ValueError):
    """An argument of a public function has a wrong type or value. Message: "name: what was given. What it must be."."""


class DataError(UserError):
    """Training data or a tokenizer is missing, broken, or does not fit the configuration."""


class CheckpointError(UserError):
    """A checkpoint is missing, broken, or belongs to another architecture."""


class DamagedError(CheckpointError):
    """Files of a checkpoint are missing or differ from what was written. `problem`: the message without the remedy."""

    @property
    def problem(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        text = f"{self.problem}. The checkpoint is damaged: copy it again, or use an older one"
        return shortened(printable(text), self.limit)


class UnreadableError(CheckpointError):
    """The system refuses to read a checkpoint, for example because permission is missing. It may well be intact."""


class TrainingError(UserError):
    """Training itself went wrong, and the run stops as its configuration says."""


class DivergedError(TrainingError):
    """Losses or gradients that are not finite, or spikes of the loss, have ended the training."""


class RunStopped(Exception):
    """A run was asked to stop before its end and has saved a checkpoint. Started again, it goes on. Exit code 75."""


class LaunchError(UserError):
    """The launcher's environment contradicts itself, or the ranks cannot meet."""


class NodeError(LaunchError):
    """A problem of one node: all its ranks find the same, and ranks of other nodes may not."""


class DisagreementError(UserError):
    """The ranks of a run would not do the same work. All of them raise the same error."""

    limit = 10 * MESSAGE_LIMIT


class LostContactError(LaunchError):
    """Ranks have lost contact, or have not met in time. This is not the user's mistake. Exit code 69."""


def printable(text: str) -> str:
    """`text` with control and other unprintable characters written as escapes; line ends stay."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of the message of `error`, without the stack traces that libraries append."""
    return str(error).strip().partition("\n")[0]


def shortened(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """`text` in at most `limit` characters. A longer one keeps its beginning and its end, where the remedy stands."""
    if len(text) <= limit:
        return text
    mark = f" [... {len(text) - limit:,} more characters ...] "
    kept = limit - len(mark)
    return text[: kept * 2 // 3] + mark + text[len(text) - kept // 3 :]


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxlong = self.maxother = 80

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write integers of thousands of digits.
        return super().repr_int(value, level) if abs(value) < 2**4096 else f"an integer of {value.bit_length():,} bits"


def shown(value: object) -> str:
    """The repr of a value from a file, shortened for a message whatever its size and nesting."""
    return _Brief().repr(value)


def broken_link(path: str | os.PathLike[str]) -> str | None:
    """Why `path` cannot be reached when it, or a folder above it, is a broken link; None when there is no such link.

    The text completes a sentence that begins with the path.
    """
    for place in (Path(path), *Path(path).parents):
        try:
            if not os.path.islink(place) or os.path.exists(place):
                continue
            target = os.readlink(place)
            os.stat(place)
        except FileNotFoundError:
            problem = f"is a link to {target}, and nothing is there"
        except OSError as error:
            problem = f"is a link to {target}, which cannot be followed ({error.strerror})"
        else:
            continue
        return problem if place == Path(path) else f"cannot be reached, because {place} {problem}"
    return None


def system_reason(error: OSError, path: str | os.PathLike[str]) -> str:
    """Why the system refused `path`. For a broken link: where it leads."""
    return broken_link(path) or error.strerror or str(error)


# What helps when a file cannot be written, apart from another place for it.
_HELPS_WRITING = {
    errno.ENOSPC: "Free space there",
    errno.EDQUOT: "Free space of your quota there",
    errno.EFBIG: "Allow larger files (`ulimit -f`)",
    errno.EACCES: "Correct the permissions",
    errno.EPERM: "Correct the permissions",
    errno.EROFS: "Mount the file system writable",
    errno.EAGAIN: "Wait until it is done",
}


def write_remedy(error: OSError, remedy: str) -> str:
    """What helps against an error of writing, if anything does, or else `remedy`, such as "Choose another folder."."""
    helps = _HELPS_WRITING.get(error.errno or 0)
    return remedy if helps is None else f"{helps}, or {remedy[0].lower()}{remedy[1:]}"


@contextmanager
def write_errors(kind: type[UserError], path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """As `file_errors`, for a block that writes, with the remedy of `write_remedy`."""
    with file_errors(kind, path, remedy, write_remedy):
        yield


def _always(error: OSError, remedy: str) -> str:
    return remedy


@contextmanager
def file_errors(
    kind: type[UserError],
    path: str | os.PathLike[str],
    remedy: str,
    remedy_for: Callable[[OSError, str], str] = _always,
) -> Iterator[None]:
    """Turn an OSError in the block into a `kind`: "path: reason. remedy".

    If the error is about another file, such as a library's own, that file is named instead of `path`.
    If too many files are open, the remedy is the one for that.
    A name that cannot be a path at all (with a NUL in it, or not encodable) raises `kind` before the block.
    """
    try:
        is_path = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise kind(f"{os.fspath(path)!r}: cannot be a path. {remedy}")
    try:
        yield
    except OSError as error:
        helps = open_files.remedy(error) or remedy_for(error, remedy)
        failed = _failed_file(error, os.fspath(path))
        raise kind(f"{failed}: {system_reason(error, failed)}. {helps}") from error


def _failed_file(error: OSError, path: str) -> str:
    """The file to name in a message: the one in `error`, or `path` in three cases. The error names none; it names the
    temporary name of `path`; or it names a file in the folder `path`, which does not exist.
    """
    named = error.filename
    if not isinstance(named, (str, bytes, os.PathLike)):
        return path
    name = os.fsdecode(named)
    is_within = name.startswith(os.path.join(path, ""))
    is_missing = error.errno == errno.ENOENT and not os.path.lexists(path)
    is_of_path = name.startswith(path) and (not is_within or is_missing)
    return path if is_of_path or os.path.realpath(name) == os.path.realpath(path) else name


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`, and turn errors that the user can correct into one message and an exit code.

    - `UserError`: `error: <message>` on stderr, exit code 2. The same, as a last resort, for an OSError that names a
      file, concerns the disk, or says that too many files are open.
    - `LostContactError`: the same with exit code 69. `RunStopped`: its message, exit code 75.
    - Ctrl-C: exit code 130, by a KeyboardInterrupt, so that `main` can clean up. SIGTERM: the same, with a line
      on stderr and exit code 143.
    - A reader that closed the pipe (`... | head`): exit code 1 and no message.
    - Everything else is our bug and keeps its traceback.
    """
    with terminated_by_exception():
        _run(main, end_by_exception)


def _run(main: Callable[[], None], prepare: Callable[[], None]) -> None:
    prepare_streams()
    try:
        prepare()
        open_files.raise_limit()
        main()
        sys.stdout.flush()  # a closed pipe or a full disk raises here, not in the interpreter's shutdown
    except LostContactError as error:
        _fail(str(error), LOST_EXIT_CODE)
    except UserError as error:
        _fail(str(error))
    except RunStopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(STOPPED_EXIT_CODE)
    except Terminated:
        _terminated()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_EXIT_CODE)
    except ImportError as error:
        if not _was(KeyboardInterrupt, error):
            raise
        if _was(Terminated, error):
            _terminated()
        sys.exit(INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        discard(sys.stdout)
        sys.exit(1)
    except OSError as error:
        too_many = open_files.remedy(error)
        if error.filename is None and error.errno not in DISK_ERRORS and too_many is None:
            raise
        file = None if error.filename is None else os.fsdecode(error.filename)
        reason = error.strerror if file is None else system_reason(error, file)
        _fail(f"{file or 'a file or the output'}: {reason}" + (f". {too_many}" if too_many else ""))


def run_rank(main: Callable[[], None]) -> NoReturn:
    """As `run_command`, for a process of torch.distributed. It ends with `exit_now`, and Ctrl-C ends it at once."""
    code: object = 0
    try:
        _run(main, lambda: None)
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    exit_now(code if isinstance(code, int) else 0)


def exit_now(code: int = 0) -> NoReturn:
    """End the process without the interpreter's shutdown.

    Threads of torch and gloo may be about to take the interpreter's lock. If the interpreter shuts down at that moment,
    which happens once in some thousand times, a rank that has done all its work ends with "terminate called" and a
    signal.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {_ended(message)}", file=sys.stderr)
    flush_or_discard(sys.stdout)
    sys.exit(code)


def _ended(message: str) -> str:
    """`message` with a full stop: one that others build sentences on has none. The items of a list stay as they are."""
    is_item = message.rpartition("\n")[2].startswith("  - ")
    return message if is_item or message.endswith((".", "?", "!", ":")) else f"{message}."


def _terminated() -> NoReturn:
    """Ends this process after SIGTERM. The interpreter's shutdown would wait for child processes without the signal."""
    print("stopped by SIGTERM", file=sys.stderr)
    exit_now(TERMINATED_EXIT_CODE)


def _was(kind: type[KeyboardInterrupt], error: BaseException) -> bool:
    """Whether `kind` caused `error`: extension modules turn it into an ImportError while they are imported."""
    causes = [cause for cause in (error.__cause__, error.__context__) if cause is not None]
    return isinstance(error, kind) or any(_was(kind, cause) for cause in causes)
