"""The files that a preparation reads, from names and globs: every file once, and none skipped silently."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from megatron_tf.data.preparation.contents import kind_by_name
from megatron_tf.data.preparation.formats import inspect_file
from megatron_tf.errors import DataError, file_errors
from megatron_tf.telemetry.text import count_of

REMEDY = "Correct the path, make it readable, or remove it."
PROBLEMS_SHOWN = 10
Identity = tuple[int, int] | str


def expand_inputs(
    patterns: Iterable[str],
    note: Callable[[str], None] = lambda text: None,
    is_output: Callable[[str], bool] = lambda name: False,
) -> list[Path]:
    """The files of `find_inputs`. Raises `DataError` also for files of an unknown kind."""
    files = find_inputs(patterns, note, is_output)
    _check_contents(files)
    return files


def find_inputs(
    patterns: Iterable[str],
    note: Callable[[str], None] = lambda text: None,
    is_output: Callable[[str], bool] = lambda name: False,
    ending: str = ".jsonl",
) -> list[Path]:
    """The files that names and globs (`**` included) stand for, each once, those of a glob in alphabetical order.

    Links are followed. A file with several names, hard links included, is read under one of them, and `note` is told.
    A glob does not match files for which `is_output` is true. `ending`: of the example in a message. Raises `DataError`
    for a pattern that matches nothing, a broken link, and anything that is not a file or not accessible.
    """
    found: dict[Identity, str] = {}
    repeated: list[tuple[str, str]] = []
    for pattern in patterns:
        with file_errors(DataError, pattern, REMEDY):
            names = [name for name in _names(pattern) if name == pattern or not is_output(name)]
        if not names:
            raise DataError(f"{pattern}: no such file. Correct the path, or quote a glob so that it arrives whole.")
        chosen: dict[Identity, str] = {}
        for name in sorted(names, key=_preference):
            identity = _identity(name, pattern, ending)
            if (known := found.get(identity, chosen.get(identity))) is None:
                chosen[identity] = name
            else:
                repeated.append((name, known))
        found.update(sorted(chosen.items(), key=lambda item: item[1]))
    if repeated:
        name, known = repeated[0]
        others = f"; the same of {count_of(len(repeated) - 1, 'other name')}" if len(repeated) > 1 else ""
        note(f"{name} is the file {known}, which is read once{others}")
    return [Path(name) for name in found.values()]


def _preference(name: str) -> tuple[bool, bool, str]:
    """Sort key of names: a file is read under its smallest, preferably one that tells its kind and is not a link."""
    return kind_by_name(name) is None, os.path.islink(name), name


def _identity(name: str, pattern: str, ending: str) -> Identity:
    """The same value for all names of a file, and another one for any other file. `DataError` unless it is a file."""
    with file_errors(DataError, name, REMEDY):
        status = os.stat(name)
    if stat.S_ISDIR(status.st_mode):
        origin = "" if name == pattern else f" that {pattern} does not look into"
        folder = name.rstrip("/")
        raise DataError(
            f"{name}: is no file, but a folder{origin}. Name the files in a folder as a quoted glob: "
            f"'{folder}/*{ending}', or '{folder}/**/*{ending}' with those of the folders below it."
        )
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{name}: is no file, but a FIFO, a socket or a device. Write what it gives into a file first.")
    # Some file systems do not number their files.
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(name)


def _check_contents(files: Sequence[Path]) -> None:
    """Raise one `DataError` for all files of an unknown kind."""
    problems = []
    for path in files:
        with file_errors(DataError, path, "Make it readable, or leave it out."):
            content = inspect_file(path)
        if content.kind == "unknown":
            problems.append(f"{path}: {content.detail}.")
    if len(problems) > PROBLEMS_SHOWN:
        problems[PROBLEMS_SHOWN:] = [f"... and {count_of(len(problems) - PROBLEMS_SHOWN, 'more file')}."]
    if problems:
        raise DataError("\n".join(problems))


def _names(pattern: str) -> list[str]:
    """`pattern`, if it is a name; else what it matches as a glob. Raises OSError."""
    try:
        os.lstat(pattern)
    except OSError as error:
        if not glob.has_magic(pattern) and not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise
    else:
        return [pattern]
    steps = pattern.split("/")
    names = _matches("", steps)
    # `**` also enters every folder, so that a folder among the matches is not a file that was missed.
    return [name for name in names if not os.path.isdir(name)] if "**" in steps else list(names)


def _matches(folder: str, steps: Sequence[str]) -> Iterator[str]:
    """Names below `folder` ("": the current one) that match `steps`, the parts of a glob. Broken links are included."""
    step, rest = steps[0], steps[1:]
    if step == "**":
        for below in _folders_below(folder):
            yield from _matches(below, rest or ["*"])
        return
    if glob.has_magic(step):
        with file_errors(DataError, folder, REMEDY):
            names = fnmatch.filter(os.listdir(folder or "."), step)
        paths = [os.path.join(folder, name) for name in names if step.startswith(".") or not name.startswith(".")]
    else:
        paths = [os.path.join(folder, step) if step else folder or "/"]
    for path in paths:
        if rest and os.path.isdir(path):
            yield from _matches(path, rest)
        elif os.path.lexists(path) and not (rest and os.path.exists(path)):
            # also a broken link in the place of a folder, so that it is reported by its name
            yield path


def _folders_below(top: str) -> Iterator[str]:
    """`top` and all folders below it except hidden ones, each once, under its own name rather than that of a link.

    Raises `DataError` for a folder that cannot be read, and for a broken link.
    """
    seen = set()
    folders, links = deque([top]), deque[str]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        identity = _folder_identity(folder)
        if identity is None or identity in seen:
            continue
        seen.add(identity)
        yield folder
        with file_errors(DataError, folder, REMEDY), os.scandir(folder or ".") as entries:
            shown = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        links.extend(os.path.join(folder, entry.name) for entry in shown if entry.is_symlink())
        folders.extend(os.path.join(folder, entry.name) for entry in shown if entry.is_dir(follow_symlinks=False))


def _folder_identity(path: str) -> Identity | None:
    """As `_identity`, for a folder; None for anything else. Raises `DataError` for a broken link."""
    with file_errors(DataError, path, REMEDY):
        status = os.stat(path or ".")
    if not stat.S_ISDIR(status.st_mode):
        return None
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
