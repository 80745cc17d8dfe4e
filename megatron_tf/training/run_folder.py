"""The identity of a run's folder, recorded in its checkpoints: a copy of a run is another run, a moved one is not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def folder_identity(run_dir: Path) -> dict[str, Any]:
    """Facts that tell the folder from its copies: the field `folder` of `CheckpointIndex.run`; {} if it is missing."""
    try:
        status = run_dir.stat()
    except OSError:
        return {}
    return {"folder": {"path": str(run_dir.resolve()), "device": status.st_dev, "inode": status.st_ino}}


def copied_from(run_state: Mapping[str, Any], run_dir: Path) -> str | None:
    """The folder that `run_dir` is a copy of, by the state in its checkpoint; None when it is the same folder.

    A renamed folder is the same, and so is one at the same path, as after a restored backup. Checkpoints of earlier
    versions do not record it, and count as the same.
    """
    then, now = run_state.get("folder"), folder_identity(run_dir).get("folder")
    if then is None or now is None or then["path"] == now["path"]:
        return None
    return None if (then["device"], then["inode"]) == (now["device"], now["inode"]) else then["path"]
