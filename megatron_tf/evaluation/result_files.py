"""Under which name an evaluation is kept: one of the same settings is replaced, one of other settings is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from megatron_tf.durable import read_plain
from megatron_tf.errors import NOT_AS_WRITTEN

_LARGEST_FILE = 2**30
# Of the settings that all kinds of file hold. The layout is not among them: it does not change the result.
_SETTINGS = ("checkpoint", "precision")
_TEXT_SETTINGS = (*_SETTINGS, "window")
Identity = tuple[Any, ...]


def perplexity_identity(values: Mapping[str, Any]) -> Identity:
    """What tells an evaluation on data from another one, of `report.perplexity_values`. KeyError when it is none."""
    return (
        *(values[key] for key in (*_TEXT_SETTINGS, "stride", "max_tokens")),
        *(data["path"] for data in values["data"]),
    )


def tasks_identity(values: Mapping[str, Any]) -> Identity:
    """What tells a run of tasks from another one, of the values of a tasks file. KeyError when it is none."""
    settings = values["megatron_tf"]
    return (*(settings[key] for key in (*_TEXT_SETTINGS, "limit")), *settings["tasks"])


def copying_identity(values: Mapping[str, Any]) -> Identity:
    """What tells an evaluation of copying from another one. KeyError when it is none."""
    return (*(values[key] for key in _SETTINGS), values["copying"]["tokens"])


def images_identity(values: Mapping[str, Any]) -> Identity:
    """What tells an evaluation on images from another one, of the values of its file. KeyError when it is none."""
    return (*(values[key] for key in (*_SETTINGS, "crop")), *(data["path"] for data in values["data"]))


def result_file(path: Path, values: Mapping[str, Any], identity: Callable[[Mapping[str, Any]], Identity]) -> Path:
    """Where to write `values`: `path`, or the first of NAME-2.json, NAME-3.json ... that is free or of the same
    settings."""
    for number in count(1):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        if not candidate.exists() or _identity_in(candidate, identity) == identity(values):
            return candidate
    raise AssertionError("numbers do not end")


def _identity_in(path: Path, identity: Callable[[Mapping[str, Any]], Identity]) -> Identity | None:
    """None for what is no such file, or one from before its settings were kept in full."""
    try:
        return identity(json.loads(read_plain(path, _LARGEST_FILE)))
    except (OSError, *NOT_AS_WRITTEN):
        return None
