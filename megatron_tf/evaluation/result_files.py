"""Names of the files of results: a file of an evaluation with the same settings is replaced, others are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from megatron_tf.durable import read_plain
from megatron_tf.errors import NOT_AS_WRITTEN

_LARGEST_FILE = 2**30
# Settings that all kinds of file hold. The layout is not one of them: it does not change the result.
_SETTINGS = ("checkpoint", "precision")
_TEXT_SETTINGS = (*_SETTINGS, "window")
Identity = tuple[Any, ...]


def perplexity_identity(values: Mapping[str, Any]) -> Identity:
    """The settings that tell two evaluations on data apart, taken from `report.perplexity_values`.

    KeyError when `values` are not of that kind.
    """
    return (
        *(values[key] for key in (*_TEXT_SETTINGS, "stride", "max_tokens", "reset_at_eod", "mask_eod_loss", "pad_id")),
        *(data["path"] for data in values["data"]),
    )


def tasks_identity(values: Mapping[str, Any]) -> Identity:
    """The settings that tell two runs of tasks apart. KeyError when `values` are not those of a tasks file."""
    settings = values["megatron_tf"]
    return (*(settings[key] for key in (*_TEXT_SETTINGS, "limit", "reset_at_eod", "tokenizer")), *settings["tasks"])


def copying_identity(values: Mapping[str, Any]) -> Identity:
    """The settings that tell two evaluations of copying apart. KeyError when `values` are not those of such a file."""
    return (*(values[key] for key in _SETTINGS), values["copying"]["tokens"])


def images_identity(values: Mapping[str, Any]) -> Identity:
    """The settings that tell two evaluations on images apart. KeyError when `values` are not those of such a file."""
    return (*(values[key] for key in (*_SETTINGS, "crop")), *(data["path"] for data in values["data"]))


def result_file(path: Path, values: Mapping[str, Any], identity: Callable[[Mapping[str, Any]], Identity]) -> Path:
    """Where to write `values`: the first of `path`, NAME-2.json, ... that is free or holds the same settings."""
    for number in count(1):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        if not candidate.exists() or _identity_in(candidate, identity) == identity(values):
            return candidate
    raise AssertionError("numbers do not end")


def _identity_in(path: Path, identity: Callable[[Mapping[str, Any]], Identity]) -> Identity | None:
    """The identity in the file; None if it is not a file of this kind, or an old one without all settings."""
    try:
        return identity(json.loads(read_plain(path, _LARGEST_FILE)))
    except (OSError, *NOT_AS_WRITTEN):
        return None
