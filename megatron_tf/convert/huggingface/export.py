"""Exports a trained model as a folder that transformers and vLLM load: weights, configuration, tokenizer, own code.

| file | content |
|---|---|
| model.safetensors | fp32 weights under their Hugging Face names; value tokens transposed, as linear layers have them |
| config.json | the architecture, τ of every projection, and the versions that the export was verified with |
| generation_config.json | the token that ends a text, when the tokenizer is known |
| configuration_, modeling_, pattention_tokenformer.py | the model for transformers; needs torch and transformers |
| tokenizer.json, tokenizer_config.json | the tokenizer as in preparation, when it is a Hugging Face tokenizers file |
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from megatron_tf.checkpoint.kinds import EXPORT_CONFIG as CONFIG_NAME
from megatron_tf.convert.agreement import Agreement
from megatron_tf.convert.huggingface.configuration import (
    CODE,
    huggingface_config,
    special_tokens,
)
from megatron_tf.convert.huggingface.verify import verified_with, verify_export, verifying_versions
from megatron_tf.costs.estimate import num_parameters
from megatron_tf.data.tokenizer import Tokenizer
from megatron_tf.data.tokenizer_files import as_in_preparation, read_tokenizer_file
from megatron_tf.durable import atomic_folder, partial_path, prepare_output
from megatron_tf.errors import CheckpointError, file_errors
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.state.parameters import parameter_table

WEIGHTS_NAME = "model.safetensors"
TOKENIZER_NAME = "tokenizer.json"
_FILE_OVERHEAD_BYTES = 64 * 2**20  # tokenizer, code, headers


@dataclass(frozen=True)
class ExportedTokenizer:
    """A tokenizer. `file`: its Hugging Face tokenizers file, which goes into the export; None for another kind of
    tokenizer, which does not."""

    tokenizer: Tokenizer
    file: Path | None


def check_target(path: Path) -> None:
    """Create the parent folder of the export `path`.

    CheckpointError when `path` or its temporary name exists, another UserError when `path` cannot be written.
    """
    for folder in (path, partial_path(path)):
        if os.path.lexists(folder):
            left = " (left behind by an export that was cut off, if nobody else made it)" if folder != path else ""
            raise CheckpointError(
                f"{folder}: exists already{left}. Nothing is overwritten: remove it, or give another folder"
            )
    prepare_output(path)


def write_export(
    path: Path, network: TokenFormer, tokenizer: ExportedTokenizer | None, copied: Sequence[Path] = ()
) -> dict[str, Agreement]:
    """Write `network`, load the result as a user would, and compare; returns the agreement by kind of sample.

    `copied`: files of another export that are copied unchanged. Raises CheckpointError, also when transformers computes
    something else than `network`, and UserError without transformers. After an error nothing is left behind.
    """
    versions = verifying_versions()
    with new_folder(path, network) as folder:
        _write_configuration(folder, network, tokenizer, versions)
        write_weights(folder, network)
        for file in copied:
            shutil.copyfile(file, folder / file.name)
        return verify_export(folder, network, tokenizer.tokenizer if tokenizer and tokenizer.file else None)


@contextmanager
def new_folder(path: Path, network: TokenFormer) -> Iterator[Path]:
    """Yield a folder that becomes `path` when the block succeeds. After an error nothing is left behind.

    CheckpointError when there is too little room or a file cannot be written.
    """
    needed = 4 * num_parameters(network.config) + _FILE_OVERHEAD_BYTES
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise CheckpointError(
            f"{path}: the export takes up to {needed:,} bytes, and {free:,} are free there. Make room"
        )
    with file_errors(CheckpointError, path, "Nothing was written."), atomic_folder(path) as folder:
        yield folder


def _write_configuration(
    folder: Path, network: TokenFormer, exported: ExportedTokenizer | None, versions: Mapping[str, str]
) -> None:
    eod_id = exported.tokenizer.eod_id if exported else None
    config = huggingface_config(network.config, network.scales, eod_id)
    write_json(folder / CONFIG_NAME, {**config, "verified_with": versions})
    write_json(folder / "generation_config.json", special_tokens(eod_id))
    write_code(folder, CODE, versions, "compare a cached generation with an uncached one")
    if exported and exported.file:
        (folder / TOKENIZER_NAME).write_bytes(as_in_preparation(read_tokenizer_file(exported.file)))
        end = exported.tokenizer.decode([exported.tokenizer.eod_id])
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": network.config.seq_length,
            "padding_side": "left",  # so that generation continues a text directly at its end
            "clean_up_tokenization_spaces": False,
            "bos_token": end,
            "eos_token": end,
            "pad_token": end,
        }
        write_json(folder / "tokenizer_config.json", settings)


def write_code(folder: Path, names: Sequence[str], versions: Mapping[str, str], comparison: str) -> None:
    """Copy the files `names` of remote_code, each with a first line that names the verified versions.

    The code stays as it is while transformers changes, and that line tells a reader years later what it was made for.
    """
    for name in names:
        code = resources.files("megatron_tf.convert.huggingface") / "remote_code" / name
        text = f"{verified_with(versions)}. With others, {comparison}, or export again.\n"
        (folder / name).write_bytes(text.encode() + code.read_bytes())


def write_weights(folder: Path, network: TokenFormer) -> None:
    state = network.state_dict()
    tensors = {
        spec.huggingface_name: (state[name].mT if spec.transposed else state[name]).contiguous()
        for name, spec in parameter_table(network.config).items()
    }
    try:
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    except SafetensorError as error:  # the library raises this for every error of the disk
        raise CheckpointError(f"{folder / WEIGHTS_NAME}: {error}. Nothing was written.") from error
    shutil.copymode(folder / CONFIG_NAME, folder / WEIGHTS_NAME)  # the library makes it readable by its owner only


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
