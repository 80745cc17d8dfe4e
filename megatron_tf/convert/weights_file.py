"""The weights of a checkpoint, without its optimizer state, as one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_tf.checkpoint.architecture import stored_model
from megatron_tf.checkpoint.reader import CheckpointReader, read_weights
from megatron_tf.durable import atomic_path
from megatron_tf.errors import CheckpointError, file_errors


def write_weights_file(path: Path, reader: CheckpointReader) -> int:
    """Write fp32 weights by logical name, in logical shapes, to `path`; returns its bytes.

    The file's metadata has "model" (the configuration's section) and "scales" (τ by projection), as JSON, and "step".
    The whole model is held in memory. Errors: CheckpointError, with nothing left behind.
    """
    metadata = {
        "format": "pt",  # the library that reads it, as transformers expects
        "model": json.dumps(stored_model(reader.index).model_dump(mode="json")),
        "scales": json.dumps(dict(reader.index.scales)),
        "step": str(reader.index.step),
    }
    with file_errors(CheckpointError, path, "Nothing was written."), atomic_path(path) as temporary:
        mode = temporary.stat().st_mode
        try:
            save_file(read_weights(reader), temporary, metadata)
        except SafetensorError as error:  # safetensors raises it for every error of the disk
            raise CheckpointError(f"{path}: {error}. Nothing was written.") from error
        temporary.chmod(mode)  # safetensors lets only the owner read its files
        return temporary.stat().st_size
