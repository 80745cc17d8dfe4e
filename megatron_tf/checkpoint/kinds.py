"""What a folder holds, told by the names in it, without reading: to say what was given in place of what is needed."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_tf.checkpoint.format import INDEX_NAME, MANIFEST_NAME

CHECKPOINTS_FOLDER = "checkpoints"  # within a run's folder
EXPORT_CONFIG = "config.json"  # of transformers; checkpoints have no such file


def holds_export(folder: Path) -> bool:
    """Whether the folder has a configuration of transformers, valid or not."""
    return os.path.lexists(folder / EXPORT_CONFIG)


def holds_run(folder: Path) -> bool:
    """Whether it is the folder of a run, or a checkpoint."""
    return any(os.path.lexists(folder / name) for name in (CHECKPOINTS_FOLDER, MANIFEST_NAME, INDEX_NAME))
