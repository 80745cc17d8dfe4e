"""What a checkpoint holds, as plain values for tables and JSON. Reads the index only."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ValidationError

from megatron_tf.checkpoint.format import BYTES_PER_ELEMENT, CheckpointIndex
from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.config.sections.model import Model
from megatron_tf.state.parameters import parameter_table


def summarize(reader: CheckpointReader) -> dict[str, Any]:
    """Plain values only. `used_parameters`: those that a position uses, None where the tensors are not the model's;
    `scales`: the distinct τ of each kind of projection; `adam_steps`: a range "least to most"."""
    index = reader.index
    scales: dict[str, list[float]] = {}
    for name, scale in index.scales.items():
        distinct = scales.setdefault(_without_layer(name), [])
        if scale not in distinct:
            distinct.append(scale)
    tensors = {
        name: {
            "shape": list(tensor.shape),
            "states": list(tensor.states),
            "bytes": tensor.numel * BYTES_PER_ELEMENT * len(tensor.states),
            "adam_steps": _step_text([steps for _, _, steps in index.adam_steps.get(name, ())]),
        }
        for name, tensor in index.tensors.items()
    }
    return {
        "path": str(reader.path),
        "format_version": index.format_version,
        "bytes": sum(stored.num_bytes for stored in reader.manifest.files.values()),
        "step": index.step,
        "samples": index.samples,
        "tokens": index.tokens,
        "parameters": sum(math.prod(tensor.shape) for tensor in index.tensors.values()),
        "used_parameters": _used_parameters(index),
        "model": dict(index.model),
        "scales": scales,
        "growth_history": [dict(entry) for entry in index.growth_history],
        "data": dict(index.data),
        "trackers": dict(index.trackers),
        "run": dict(index.run),
        "tensors": tensors,
    }


def _used_parameters(index: CheckpointIndex) -> int | None:
    try:
        model = Model.model_validate(dict(index.model))
    except ValidationError:
        return None
    # a section that somebody changed may have any number of layers
    table = parameter_table(model) if model.num_layers <= len(index.tensors) else {}
    shapes = {name: tensor.shape for name, tensor in index.tensors.items()}
    if shapes != {name: spec.shape for name, spec in table.items()}:
        return None
    return sum(spec.num_used for spec in table.values())


def _without_layer(projection: str) -> str:
    """ "blocks.3.attention.query" -> "attention.query"."""
    parts = projection.split(".")
    return ".".join(parts[2:]) if parts[0] == "blocks" and len(parts) > 2 else projection


def _step_text(steps: list[int]) -> str:
    if not steps:
        return "-"
    return str(steps[0]) if min(steps) == max(steps) else f"{min(steps)} to {max(steps)}"
