"""Which checkpoints a folder holds: the newest good one, and which old ones may go."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from megatron_tf.checkpoint.format import INDEX_NAME, MANIFEST_NAME
from megatron_tf.checkpoint.reader import CheckpointReader, open_checkpoint
from megatron_tf.errors import CheckpointError

STEP_PREFIX = "step_"
UNFINISHED_PREFIX = ".tmp-"  # a folder being written or deleted: never a checkpoint
REPLACED_PREFIX = ".old-"  # a complete checkpoint, set aside while another one takes its name
CHECKPOINTS_FOLDER = "checkpoints"  # within a run's folder

Skipped = list[tuple[Path, str]]


def find_latest(root: Path | str, *, verify: bool) -> tuple[Path | None, Skipped]:
    """The newest valid checkpoint in the folder `root`, and what was passed over, each with its reason.

    Newest is the highest step inside, whatever a folder is called. `verify` also compares the checksums of
    all its bytes, which reads it whole; without it a flipped byte in a shard goes unnoticed.
    """
    readers, skipped = _survey(Path(root))
    for reader in readers:
        try:
            if verify:
                reader.verify()
            return reader.path, skipped
        except CheckpointError as error:
            skipped.append((reader.path, str(error)))
    return None, skipped


def resolve(path: Path | str) -> Path:
    """The checkpoint that a user means by `path`: a checkpoint, or the newest valid one of a checkpoints or run folder.

    CheckpointError when there is none, with the reason for each that was passed over.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Give a checkpoint, a checkpoints or a run folder")
    if _looks_like_checkpoint(folder):
        return open_checkpoint(folder).path
    inner = folder / CHECKPOINTS_FOLDER
    latest, skipped = find_latest(inner if inner.is_dir() else folder, verify=False)
    if latest is None:
        reasons = "".join(f"\n  - {reason}" for _, reason in skipped)
        raise CheckpointError(f"{folder}: holds no complete checkpoint{':' if reasons else ''}{reasons}")
    return latest


def prune(root: Path | str, keep_last: int, known_good: Collection[Path] = ()) -> list[Path]:
    """Delete all but the newest `keep_last` good checkpoints of `root`; returns what was deleted.

    A checkpoint counts as kept only when all its checksums are right, so that a damaged newest one never
    makes the last good one disposable. `known_good` names those that need not be read again for this: written
    or verified by this process. Damaged ones are left for the user to see.
    """
    assert keep_last >= 1
    good = {Path(path).resolve() for path in known_good}
    kept, deleted = 0, []
    for reader in _survey(Path(root))[0]:
        if kept < keep_last:
            kept += reader.path.resolve() in good or _is_sound(reader)
        else:
            _delete(reader.path)
            deleted.append(reader.path)
    return deleted


def _survey(root: Path) -> tuple[list[CheckpointReader], Skipped]:
    """Every checkpoint that opens, newest first, and those that do not, with the reason."""
    readers: list[CheckpointReader] = []
    skipped: Skipped = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if folder.name.startswith(UNFINISHED_PREFIX) or not folder.is_dir() or not _looks_like_checkpoint(folder):
            continue
        try:
            readers.append(open_checkpoint(folder))
        except CheckpointError as error:
            skipped.append((folder, str(error)))
    # Of two with one step, the one that was set aside is the older.
    readers.sort(key=lambda reader: (reader.index.step, not reader.path.name.startswith(REPLACED_PREFIX)), reverse=True)
    return readers, skipped


def _looks_like_checkpoint(folder: Path) -> bool:
    """Whether the folder claims to be a checkpoint, so that a broken one is named instead of ignored."""
    named = folder.name.startswith((STEP_PREFIX, REPLACED_PREFIX))
    return named or (folder / MANIFEST_NAME).exists() or (folder / INDEX_NAME).exists()


def _is_sound(reader: CheckpointReader) -> bool:
    try:
        reader.verify()
    except CheckpointError:
        return False
    return True


def _delete(folder: Path) -> None:
    """Take the name away first: a deletion that is cut off leaves nothing that looks like a broken checkpoint."""
    doomed = folder.with_name(f"{UNFINISHED_PREFIX}{folder.name}-deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
