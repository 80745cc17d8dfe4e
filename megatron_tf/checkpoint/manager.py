"""The checkpoints in a folder: finding the newest good one, and deleting old ones."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from megatron_tf.checkpoint.format import INDEX_NAME, MANIFEST_NAME
from megatron_tf.checkpoint.kinds import CHECKPOINTS_FOLDER, holds_export
from megatron_tf.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_tf.errors import (
    CheckpointError,
    DamagedError,
    DisagreementError,
    UnreadableError,
    broken_link,
    file_errors,
    system_reason,
)
from megatron_tf.telemetry.text import bullets

STEP_PREFIX = "step_"
UNFINISHED_PREFIX = ".tmp-"  # a folder being written or deleted: never a checkpoint
REPLACED_PREFIX = ".old-"  # a complete checkpoint, set aside while another one takes its name
FAILED_PREFIX = ".failed-"  # a small file: why a save failed, for the ranks that wait for it
SURVEYS = 10  # of a folder from which a run deletes checkpoints meanwhile
BEFORE_DECAY = "before_decay"  # in `CheckpointIndex.run` of one that is never deleted
_READABLE = "Make it readable, or give another folder"

Skipped = list[tuple[Path, str]]
T = TypeVar("T")
Report = Callable[[str], object]  # takes a sentence about what could not be deleted


def refuse(problem: str) -> NoReturn:
    """A `Report` that raises the problem as an error."""
    raise CheckpointError(problem)


@dataclass(frozen=True)
class Ranks:
    """The ranks that look for a checkpoint together. `gather`: a value from every rank, in order, to all of them."""

    rank: int = 0
    size: int = 1
    gather: Callable[[Any], list[Any]] = lambda value: [value]


ALONE = Ranks()


def find_latest(root: Path | str, *, verify: bool, ranks: Ranks = ALONE) -> tuple[Path | None, Skipped]:
    """(The newest valid checkpoint in the folder `root`, those that were passed over, with reasons).

    The newest is the one with the highest step in its index; names do not count. `verify` also compares the checksums
    of all its bytes, which reads it whole; without it a flipped byte in a shard goes unnoticed.
    `ranks` share that reading; all of them call this together and get the same answer.
    Links are followed; a broken one is passed over.
    UnreadableError when one that may be the newest cannot be read: an older one is then not taken in its place.
    """
    candidates, skipped = from_first(lambda: _candidates(Path(root)), ranks)
    for number, (path, error) in enumerate(candidates, 1):
        if error is None and verify:
            error = _verify(path, ranks)
        if isinstance(error, UnreadableError):
            raise UnreadableError(f"{error}. Make it readable, or move it away to go on from an older one")
        if error is None:
            older_links = [
                (link, str(why)) for link, why in candidates[number:] if why is not None and link.is_symlink()
            ]
            return path, [*skipped, *older_links]
        skipped.append((path, _problem(error)))
    return None, skipped


def verify_checkpoint(path: Path | str, ranks: Ranks = ALONE) -> None:
    """Compare all checksums of the checkpoint `path`; `ranks` share the reading, and all raise the same.

    CheckpointError names every broken file, UnreadableError one that cannot be read.
    """
    error = _verify(Path(path), ranks)
    if isinstance(error, UnreadableError):
        raise UnreadableError(f"{error}. {_READABLE}")
    if error:
        raise error


def resolve(path: Path | str, ranks: Ranks = ALONE) -> Path:
    """The checkpoint that a user means by `path`: a checkpoint, or the newest valid one of a checkpoints or run folder.

    One of `ranks` looks, and all of them get its answer. CheckpointError when there is none, with the reason for each
    that was passed over. Warns of broken ones that are newer than the one it takes.
    """
    return from_first(lambda: find_checkpoint(path)[0], ranks)


def find_checkpoint(path: Path | str) -> tuple[Path, list[str]]:
    """As `resolve`, on one process: the checkpoint, and why newer ones were passed over."""
    with file_errors(UnreadableError, path, _READABLE):
        return _find_in(Path(path))


def _find_in(folder: Path) -> tuple[Path, list[str]]:
    if not folder.is_dir():
        missing = broken_link(folder) or "there is no such folder"
        problem = "is a file" if folder.is_file() else "is no folder" if folder.exists() else missing
        raise CheckpointError(f"{folder}: {problem}. Give a checkpoint, a checkpoints or a run folder.")
    if _looks_like_checkpoint(folder):
        try:
            return open_checkpoint(folder).path, []
        except UnreadableError as error:
            raise UnreadableError(f"{error}. {_READABLE}") from error
    inner = folder / CHECKPOINTS_FOLDER
    latest, skipped = find_latest(inner if inner.is_dir() else folder, verify=False)
    if latest is None:
        reasons = bullets([reason for _, reason in skipped])
        if reasons:
            raise CheckpointError(
                f"{folder}: holds no complete checkpoint:{reasons}\nCopy them again, or give another folder."
            )
        if holds_export(folder):
            raise CheckpointError(
                f"{folder}: is an export, not a checkpoint. Make one of it with `megatron_tf convert from-hf {folder} "
                "--to RUN_DIR`, and give that folder"
            )
        raise CheckpointError(f"{folder}: holds no complete checkpoint. Give the folder of a run that has saved one.")
    if not skipped:
        return latest, []
    step = open_checkpoint(latest).index.step
    newer = [reason for broken, reason in skipped if _named_step(broken) > step]
    for reason in newer:
        _warn_once(f"not used: {reason}. {latest.name} is taken in its place")
    return latest, newer


@cache
def _warn_once(text: str) -> None:
    """Warns of `text` only the first time, because a command may look for the same checkpoint several times."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def prune(
    root: Path | str, keep_last: int, known: MutableMapping[Path, bool] | None = None, report: Report = refuse
) -> list[Path]:
    """Delete all but the newest `keep_last` good checkpoints of `root`; returns what was deleted.

    A checkpoint counts as kept only when all its checksums are right, so that a damaged newest one never
    makes the last good one disposable. Damaged and unreadable ones are left for the user to see. Those from before a
    decay stay and do not count. If an entry is a link, only the link is deleted.
    `known`: whether checkpoints, by resolved path, are good, for those that this process has written or verified;
    they are not read again, and what is read now is added.
    `report`: told of each that cannot be deleted; the others are deleted all the same.
    """
    assert keep_last >= 1
    known = {} if known is None else known
    kept: set[int] = set()  # steps: one that an interrupted save set aside is the older of two with one step
    deleted = []
    for reader in _survey(Path(root))[0]:
        if reader.index.run.get(BEFORE_DECAY):
            continue
        path = reader.path.resolve()
        if len(kept) < keep_last:
            if path not in known:
                known[path] = _verify(path, ALONE) is None
            if known[path]:
                kept.add(reader.index.step)
            continue
        for entry in dict.fromkeys((*_links_to(path, Path(root)), reader.path)):
            try:
                _delete(entry)
            except OSError as error:
                report(_undeletable(entry, error))
        if not os.path.lexists(reader.path):
            known.pop(path, None)
            deleted.append(reader.path)
    return deleted


def clear_leftovers(root: Path | str, but: str | None = None, report: Report = refuse) -> None:
    """Remove the remains of interrupted saves and deletions in `root`, and restore a checkpoint that was set aside.

    `but`: the token of a save that is under way. `report`: told of each that cannot be removed, such as another user's.
    """
    for path in _entries(Path(root)):
        if but is not None and path.name.split("-", 2)[-1] == but:
            continue  # another rank was faster
        try:
            if path.name.startswith((UNFINISHED_PREFIX, FAILED_PREFIX)):
                remove(path)
            elif path.name.startswith(REPLACED_PREFIX):
                original = path.with_name(path.name.removeprefix(REPLACED_PREFIX).split("-", 1)[0])
                if original.exists():
                    remove(path)
                else:
                    os.rename(path, original)
        except OSError as error:
            report(_undeletable(path, error))


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link but not what it leads to.

    If a part cannot be removed, everything else is removed before OSError is raised.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    try:
        shutil.rmtree(path)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        if path.exists():
            raise


def _candidates(root: Path) -> tuple[list[tuple[Path, CheckpointError | None]], Skipped]:
    """(Checkpoints that may be the newest good one, newest first, with the error of unreadable ones; broken ones, with
    reasons)."""
    readers, failures = _survey(root)
    unreadable = [(path, error) for path, error in failures if isinstance(error, UnreadableError)]
    broken = [(path, _problem(error)) for path, error in failures if not isinstance(error, UnreadableError)]
    if not unreadable:
        return [(reader.path, None) for reader in readers], broken
    # An unreadable checkpoint's step is taken from its name; without one, assume that it is the newest.
    found: list[tuple[float, Path, CheckpointError | None]] = [(_named_step(path), path, e) for path, e in unreadable]
    found += [(reader.index.step, reader.path, None) for reader in readers]
    return [(path, error) for _, path, error in sorted(found, key=lambda entry: -entry[0])], broken


def _is_gone(path: Path) -> bool:
    """Whether there is no such file any more. A file that cannot be reached may be there."""
    try:
        os.lstat(path)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return False


def _survey(root: Path) -> tuple[list[CheckpointReader], list[tuple[Path, CheckpointError]]]:
    """(Every checkpoint that can be opened, newest first; those that cannot, with reasons).

    A run that trains in the folder deletes old ones meanwhile, after it has saved newer ones: the folder is then listed
    again.
    """
    for _ in range(SURVEYS):
        readers: list[CheckpointReader] = []
        failures: list[tuple[Path, CheckpointError]] = []
        entries = [path for path in _entries(root) if not path.name.startswith((UNFINISHED_PREFIX, FAILED_PREFIX))]
        for folder in entries:
            if problem := broken_link(folder):
                failures.append((folder, UnreadableError(f"{folder}: {problem}")))
            elif _looks_like_checkpoint(folder):
                try:
                    readers.append(open_checkpoint(folder))
                except CheckpointError as error:
                    failures.append((folder, error))
        if not any(map(_is_gone, entries)):
            break
    readers.sort(key=_age, reverse=True)
    distinct: dict[Path, CheckpointReader] = {}
    for reader in readers:
        distinct.setdefault(reader.path.resolve(), reader)
    return list(distinct.values()), failures


def complete_checkpoints(root: Path) -> list[CheckpointReader]:
    """Every checkpoint in the folder `root` that has a valid manifest, newest first; checksums are not compared."""
    return _survey(root)[0]


def _age(reader: CheckpointReader) -> tuple[int, bool, bool]:
    """Orders by step. Of two with one step, the one that was set aside is the older, and a link stands behind a
    folder."""
    return reader.index.step, not reader.path.name.startswith(REPLACED_PREFIX), not reader.path.is_symlink()


def _links_to(path: Path, root: Path) -> list[Path]:
    return [entry for entry in _entries(root) if entry.is_symlink() and Path(os.path.realpath(entry)) == path]


def _entries(root: Path) -> list[Path]:
    try:
        return sorted(root.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        if problem := broken_link(root):
            raise UnreadableError(f"{root}: {problem}. Restore what it leads to, or choose another folder") from None
        return []
    except OSError as error:
        raise UnreadableError(f"{root}: cannot be read ({system_reason(error, root)})") from error


def _looks_like_checkpoint(folder: Path) -> bool:
    """Whether the folder claims to be a checkpoint, so that a broken one is named instead of ignored."""
    named = folder.name.startswith((STEP_PREFIX, REPLACED_PREFIX))
    try:
        holds_one = os.path.lexists(folder / MANIFEST_NAME) or os.path.lexists(folder / INDEX_NAME)
        return folder.is_dir() and (named or holds_one)
    except OSError:  # not readable, so the name decides: other folders, such as lost+found, must be ignored
        return named


def _named_step(entry: Path) -> float:
    """The step in the name of an unreadable checkpoint, or of the target of a link."""
    names = (entry.name, os.path.basename(os.readlink(entry))) if entry.is_symlink() else (entry.name,)
    for name in names:
        digits = name.removeprefix(STEP_PREFIX)
        if digits.isdecimal():
            return int(digits)
    return -1 if entry.is_symlink() else float("inf")  # the user's own link, such as `best`, is older than any save


def _verify(path: Path, ranks: Ranks) -> CheckpointError | None:
    """The problem of a checkpoint, as found by all ranks together; None when it is good.

    DisagreementError when nodes have different checkpoints of that name: each rank would load parts of its own.
    """
    own: CheckpointError | None = None
    content = ""
    try:
        reader = open_checkpoint(path)
        with file_errors(UnreadableError, reader.path / INDEX_NAME, "Let all ranks read it"):
            content = hashlib.sha256((reader.path / INDEX_NAME).read_bytes()).hexdigest()[:12]
        reader.verify(reader.share(ranks.rank, ranks.size))
    except CheckpointError as error:
        own = error
    found = ranks.gather((own, f"rank {ranks.rank} ({socket.gethostname()})", content))
    errors = [error for error, _, _ in found if error is not None]
    if not errors:
        _check_one_checkpoint(path, [(who, content) for _, who, content in found])
        return None
    kind = next((kind for kind in (UnreadableError, CheckpointError) if kind in map(type, errors)), DamagedError)
    return kind("\n".join(dict.fromkeys(map(_problem, errors))))


def _check_one_checkpoint(path: Path, found: Sequence[tuple[str, str]]) -> None:
    first, content = found[0]
    for who, other in found:
        if other != content:
            raise DisagreementError(
                f"{path}: the index of this checkpoint is {content} (SHA-256) on {first} and {other} on {who}. Let all "
                "nodes see one folder, or give each the same copy."
            )


def _problem(error: CheckpointError) -> str:
    """The error without its remedy, for a list with one remedy for all lines."""
    return error.problem if isinstance(error, DamagedError) else str(error)


def from_first(work: Callable[[], T], ranks: Ranks) -> T:
    """The first rank's result, or its CheckpointError, on all ranks, because nodes may see a folder differently."""
    outcome: Any = None
    if ranks.rank == 0:
        try:
            outcome = work()
        except CheckpointError as error:
            outcome = error
    outcome = ranks.gather(outcome)[0]
    if isinstance(outcome, CheckpointError):
        raise outcome
    return outcome


def _delete(entry: Path) -> None:
    """Rename before deleting, so that an interrupted deletion leaves nothing that looks like a broken checkpoint."""
    if entry.is_symlink():
        entry.unlink()
        return
    doomed = entry.with_name(f"{UNFINISHED_PREFIX}{entry.name}-deleted-{secrets.token_hex(4)}")
    os.rename(entry, doomed)
    remove(doomed)


def _undeletable(path: Path, error: OSError) -> str:
    cause = Path(os.fsdecode(error.filename)) if error.filename else path
    return f"{path} cannot be deleted: {system_reason(error, cause)} ({cause}). Saves go on; delete it by hand"
