"""Loads a trained model into one process, from a checkpoint of any layout or from an export, and its tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from megatron_tf.checkpoint.architecture import stored_model
from megatron_tf.checkpoint.manager import resolve
from megatron_tf.checkpoint.reader import open_checkpoint, read_weights
from megatron_tf.config.load import load_config
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.convert.huggingface.export import TOKENIZER_NAME
from megatron_tf.convert.huggingface.importing import is_export, open_export, stored_eod
from megatron_tf.data.special_tokens import Eod
from megatron_tf.data.summary import known_end, read_summary, summary_file
from megatron_tf.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tf.data.tokenizer_identity import TokenizerIdentity, tokenizer_identity
from megatron_tf.durable import open_plain
from megatron_tf.errors import CheckpointError, ConfigError, DataError, UserError, file_errors
from megatron_tf.model.checks import check_dtype
from megatron_tf.model.tokenformer import TokenFormer
from megatron_tf.tasks.language_model.section import vocab_size_of


@torch.no_grad()
def load_model(path: Path | str, dtype: torch.dtype = torch.float32) -> TokenFormer:
    """The model of a checkpoint, of the newest complete one in a checkpoints or run folder, or of an export.

    It is on the CPU and in evaluation mode. The checksums of a checkpoint are compared first. Raises CheckpointError,
    or ConfigError when no network can be built from the stored configuration.
    """
    check_dtype(dtype)
    if is_export(path):
        export = open_export(path)
        config, scales = export.model, export.scales
        # Copy: tensors of an export are mapped from its file at any alignment, which can change how products round.
        weights = {name: weight.to(torch.float32, copy=True) for name, weight in export.weights.items()}
    else:
        if not os.path.lexists(path):
            raise CheckpointError(
                f"{path}: there is no such folder. Give a run folder, a checkpoints folder, a checkpoint or an export"
            )
        reader = open_checkpoint(resolve(path))
        reader.verify()
        config, scales, weights = stored_model(reader.index), reader.index.scales, read_weights(reader)
    with torch.device("meta"):
        model = TokenFormer(config, scales)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    return model.to(dtype).eval()


def configured_tokenizer(path: Path | str) -> str | None:
    """The tokenizer file in the export `path`, or data.tokenizer of the run that the checkpoint `path` belongs to.

    None when there is none, or when the run's configuration is not found; ConfigError when it cannot be read.
    """
    if is_export(path):
        file = Path(path) / TOKENIZER_NAME
        return str(file) if os.path.lexists(file) else None
    config = run_config(path)
    return None if config is None else config.data.tokenizer


def known_eod(path: Path | str, tokenizer: str) -> int | None:
    """The id of the token that ends a text, as recorded in the export `path` or the run of the checkpoint `path`.

    None when it is not recorded or cannot be read, or when `tokenizer` differs from the recorded tokenizer.
    """
    with suppress(ConfigError, DataError):  # if it cannot be read, callers take the tokenizer's own end token
        configured = configured_tokenizer(path)
        if configured is None or not tokenizer_identity(configured).same(tokenizer_identity(tokenizer)):
            return None
        if is_export(path):
            return stored_eod(path)
        config = run_config(path)
        return None if config is None else known_end(config.data)
    return None


def open_tokenizer(
    name: str, model: Model, eod: Eod = None, remedy: str = "give the right one with --tokenizer"
) -> Tokenizer:
    """The tokenizer `name`, with `eod` at the end of a text. UserError, with `remedy`, when it has more tokens than the
    vocabulary of `model`, because it then belongs to another model."""
    tokenizer = load_tokenizer(name, eod)
    if tokenizer.vocab_size > vocab_size_of(model):
        raise UserError(
            f"{name}: has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size_of(model)}. "
            f"It is another model's tokenizer: {remedy}."
        )
    return tokenizer


def other_tokenizer(path: Path | str, name: str) -> str | None:
    """A warning when the tokenizer `name` differs from the one configured for the model at `path`; else None.

    UserError when the run's data are on this machine and were made with another tokenizer: the ids then have other
    meanings.
    """
    data = configured = expected = None
    with suppress(ConfigError, DataError):  # an unreadable one cannot be compared, and generating does not need it
        data = _data_tokenizer(path)
    with suppress(ConfigError, DataError):
        configured = configured_tokenizer(path)
        expected = tokenizer_identity(configured) if configured else None
    given = tokenizer_identity(name)
    if data is not None and not data[1].same(given):
        raise UserError(
            f"{name}: is another tokenizer (SHA-256 {given.file[:12]}) than the model's data were made with "
            f"({data[1].file[:12]} in {data[0]}): give the right one with --tokenizer."
        )
    if data is None and expected is not None and not expected.same(given):
        return f"{name} is another tokenizer than {configured}, the model's own"
    return None


def _data_tokenizer(path: Path | str) -> tuple[Path, TokenizerIdentity] | None:
    """(path of the summary, its tokenizer) of the first of the run's data that have a summary; None when none has."""
    config = None if is_export(path) else run_config(path)
    for source in (*config.data.train, *config.data.validation) if config else ():
        summary = read_summary(source.path)
        if summary is not None:
            return summary_file(source.path), summary.tokenizer
    return None


def run_config(path: Path | str) -> RunConfig | None:
    """The configuration of the run that the checkpoint `path` belongs to, see `file_of_run`. None when there is none;
    ConfigError when it cannot be read."""
    file = file_of_run(path, "config.yml")
    if file is None:
        return None
    with file_errors(ConfigError, file, "It was to say what the run was trained with."), open_plain(file):
        return load_config(file)


def file_of_run(path: Path | str, name: str) -> Path | None:
    """The file `name` of the run that the checkpoint `path` belongs to; None when there is none.

    It is looked for in the folder `path` and the two folders above it. If `path` is a link, the same is done at each
    link on the way and at the end.
    """
    for place in _places(Path(path)):
        for folder in (place, *place.parents[:2]):
            if os.path.lexists(folder / name):
                return folder / name
    return None


def _places(path: Path) -> Iterator[Path]:
    """`path` itself, then the target of each link that follows from it, and last the real path."""
    place, seen = os.path.abspath(path), set()
    while place not in seen:
        seen.add(place)
        yield Path(place)
        if os.path.islink(place):
            place = os.path.join(os.path.dirname(place), os.readlink(place))
    yield Path(os.path.realpath(path))
