"""One call that loads only the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megatron_tf.checkpoint.manager import resolve
from megatron_tf.checkpoint.reader import open_checkpoint, read_weights


def load_logical(path: Path | str) -> dict[str, Tensor]:
    """The fp32 weights of a checkpoint by logical name, in their logical (unsharded) shapes.

    `path`: a checkpoint, or a checkpoints or run folder, of which the newest complete one is taken.
    All checksums are compared first. Errors: CheckpointError.
    """
    reader = open_checkpoint(resolve(path))
    reader.verify()
    return read_weights(reader)
