"""In which keys two model sections differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_tf.config.sections.model import Model

TOKENS, SPARSE = "parameter_tokens.", "sparse."
# Weights of losses: no state depends on them, so a run may change them at any time.
_LOSS_WEIGHTS = frozenset({"sparse.z_loss"})


def differing(first: Model, second: Model) -> Iterator[tuple[str, Any, Any]]:
    """Yields (key, value in `first`, value in `second`) for each key in which they differ; "null" where it is not set.

    With different architectures only keys that both have are compared. With different tasks only the task is given,
    because the rest follows from it; so do keys that are `Model.derived` from others. Weights of losses do not count.
    """
    if first.task != second.task:
        yield "task", first.task, second.task
        return
    one, other = (
        _flatten(model.model_dump(exclude_none=True, exclude=set(model.derived))) for model in (first, second)
    )
    alike = first.architecture == second.architecture
    for key in {**one, **other} if alike else other:
        if (alike or key in one) and one.get(key) != other.get(key) and key not in _LOSS_WEIGHTS:
            yield key, one.get(key, "null"), other.get(key, "null")


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat
