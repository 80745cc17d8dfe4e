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

    A bank that one of them lacks is one key, such as `sparse.ffn`.
    With different architectures only keys that both have are compared. With different tasks only the task is given,
    because the rest follows from it; so do keys that are `Model.derived` from others. Weights of losses do not count.
    """
    if first.task != second.task:
        yield "task", first.task, second.task
        return
    one, other = (model.model_dump(exclude=set(model.derived)) for model in (first, second))
    alike = first.architecture == second.architecture
    for key, before, after in _differing(one, other):
        if (alike or None not in (before, after)) and key not in _LOSS_WEIGHTS:
            yield key, _shown(before), _shown(after)


def _differing(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**one, **other}:
        values = one.get(key), other.get(key)
        sections = [value for value in values if isinstance(value, Mapping)]
        # a section of sections, such as `sparse`, is compared with an empty one where it is null
        if len(sections) == 2 or any(isinstance(value, Mapping) for section in sections for value in section.values()):
            yield from _differing(values[0] or {}, values[1] or {}, f"{prefix}{key}.")
        elif values[0] != values[1]:
            yield prefix + key, *values


def _shown(value: Any) -> Any:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_shown(own)}' for key, own in value.items())}}}"
    return "null" if value is None else value
