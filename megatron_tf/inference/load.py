"""A trained model on one process, from a checkpoint of any layout or from an export, and its tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from megatron_tf.checkpoint.architecture import stored_model
from megatron_tf.checkpoint.manager import resolve
from megatron_tf.checkpoint.reader import open_checkpoint, read_weights
from megatron_tf.config.load import load_config
from megatron_tf.convert.huggingface.export import TOKENIZER_NAME
from megatron_tf.convert.huggingface.importing import is_export, open_export
from megatron_tf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tf.errors import UserError
from megatron_tf.model.tokenformer import TokenFormer


@torch.no_grad()
def load_model(path: Path | str, dtype: torch.dtype = torch.float32) -> TokenFormer:
    """The model of a checkpoint, of the newest complete one in a checkpoints or run folder, or of an export.

    All checksums are compared first. Errors: CheckpointError.
    """
    if is_export(path):
        export = open_export(path)
        config, scales, weights = export.model, export.scales, export.weights
    else:
        reader = open_checkpoint(resolve(path))
        reader.verify()
        config, scales, weights = stored_model(reader.index), reader.index.scales, read_weights(reader)
    with torch.device("meta"):
        model = TokenFormer(config, scales)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    return model.to(dtype).eval()


def configured_tokenizer(path: Path | str) -> str | None:
    """The tokenizer that lies in the export `path`, or data.tokenizer of the run that the checkpoint `path` is of."""
    if is_export(path):
        file = Path(path) / TOKENIZER_NAME
        return str(file) if file.is_file() else None
    for folder in (Path(path), *Path(path).resolve().parents[:2]):
        if os.path.isfile(folder / "config.yml"):
            return load_config(folder / "config.yml").data.tokenizer
    return None


def open_tokenizer(name: str, model: TokenFormer) -> Tokenizer:
    """The tokenizer `name`. UserError when it has more tokens than `model`: it is another model's."""
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{name}: has {tokenizer.vocab_size} tokens, the model's vocabulary {model.config.vocab_size}. "
            f"It is another model's tokenizer: give the right one with --tokenizer."
        )
    return tokenizer
