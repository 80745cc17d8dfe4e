"""The contents of an adapter's folder as plain values for tables and JSON, and the differences of two adapters."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_tf.adapters.folder import CHOICE_FIELDS, CONFIG_NAME, WEIGHTS_NAME, Adapter
from megatron_tf.checkpoint.compare import StateDifference
from megatron_tf.errors import CheckpointError

PUBLISHED = "adapter"  # within the folder of a fine-tuning run that has ended
_SETTINGS = ("modules", "num_tokens", *CHOICE_FIELDS, "frozen_tokens", "scale", "activation")


def adapter_folder(path: Path) -> Path | None:
    """The adapter at `path`: this folder; in that of a fine-tuning run the newest checkpoint, else the published
    adapter. None when there is none."""
    newest = sorted((*path.glob("step_*"), *path.glob("checkpoints/step_*")), reverse=True)
    places = (path, *newest, path / PUBLISHED)
    return next((place for place in places if os.path.lexists(place / CONFIG_NAME)), None)


def trained_adapter(path: Path) -> Path:
    """The adapter at `path`: this folder, or the one that this fine-tuning run has published. Other folders are
    returned unchanged. CheckpointError, which names the newest checkpoint, when the run has not published one."""
    for place in (path, path / PUBLISHED):
        if os.path.lexists(place / CONFIG_NAME):
            return place
    newest = adapter_folder(path)
    if newest is None:
        return path
    raise CheckpointError(
        f"{path}: is a fine-tuning run that has not ended, so it has no {PUBLISHED}/. Start it again to go on with it, "
        f"or give its newest checkpoint, {newest}"
    )


def summarize(folder: Path, adapter: Adapter) -> dict[str, Any]:
    """Plain values only. `branches`: by module, [d_in, d_out] and the root mean squares of keys and values."""
    config = adapter.config
    branches = {
        name: {
            "widths": [branch.keys.shape[1], branch.values.shape[1]],
            "keys_rms": _rms(branch.keys),
            "values_rms": _rms(branch.values),
        }
        for name, branch in adapter.branches.items()
    }
    return {
        "path": str(folder),
        "format_version": config["format_version"],
        "bytes": (folder / WEIGHTS_NAME).stat().st_size,
        "parameters": sum(
            tensor.numel() for branch in adapter.branches.values() for tensor in branch.tensors().values()
        ),
        **{key: config[key] for key in _SETTINGS if key in config},
        "base": dict(config["base"]),
        "checksum": config["checksum"],
        "history": [dict(entry) for entry in config["history"]],
        "branches": branches,
    }


def scale_text(config: Mapping[str, Any]) -> str:
    """τ of an adapter's settings or summary, as text. Appended tokens have no τ of their own."""
    return "of the base's projections" if config["scale"] is None else f"{config['scale']:.6g}"


def differences(one: Adapter, other: Adapter) -> Iterator[StateDifference]:
    """One for each tensor that differs. Of different lengths the first rows, which growth keeps, are compared."""
    for name in {**one.branches, **other.branches}:
        leaves = [adapter.branches[name].tensors() if name in adapter.branches else {} for adapter in (one, other)]
        for leaf in {**leaves[0], **leaves[1]}:
            found = _difference(f"{name}.{leaf}", *(own.get(leaf) for own in leaves))
            if not found.equal:
                yield found


def differing_settings(one: Adapter, other: Adapter) -> dict[str, list[Any]]:
    """[value in one, value in other] of each setting that differs, those of the base included."""

    def settings(adapter: Adapter) -> Mapping[str, Any]:
        base = {f"base.{key}": value for key, value in adapter.config["base"].items()}
        return {**{key: adapter.config[key] for key in _SETTINGS if key in adapter.config}, **base}

    before, after = settings(one), settings(other)
    pairs = {key: [before.get(key), after.get(key)] for key in {**before, **after}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _difference(name: str, one: Tensor | None, other: Tensor | None) -> StateDifference:
    shapes = tuple(None if tokens is None else tuple(tokens.shape) for tokens in (one, other))
    if one is None or other is None or one.shape[1:] != other.shape[1:]:
        return StateDifference(name, "weight", (shapes[0], shapes[1]), 0, 0, 0.0)
    count = min(len(one), len(other))
    distance = (one[:count].double() - other[:count].double()).abs()
    unequal = int((distance != 0).sum())  # a NaN is not 0
    largest = distance.max().item()
    return StateDifference(name, "weight", (shapes[0], shapes[1]), distance.numel(), unequal, largest)


def _rms(tokens: Tensor) -> float:
    return math.sqrt(tokens.double().square().mean().item())
