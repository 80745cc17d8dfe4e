"""A trained model on one process, from a checkpoint of any layout."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_tf.checkpoint.architecture import stored_model
from megatron_tf.checkpoint.manager import resolve
from megatron_tf.checkpoint.reader import open_checkpoint, read_weights
from megatron_tf.model.tokenformer import TokenFormer


@torch.no_grad()
def load_model(path: Path | str, dtype: torch.dtype = torch.float32) -> TokenFormer:
    """The model of a checkpoint, or of the newest complete one in a checkpoints or run folder.

    All checksums are compared first. Errors: CheckpointError.
    """
    reader = open_checkpoint(resolve(path))
    reader.verify()
    with torch.device("meta"):
        model = TokenFormer(stored_model(reader.index), reader.index.scales)
    model.load_state_dict(read_weights(reader), assign=True)
    return model.to(dtype).eval()
