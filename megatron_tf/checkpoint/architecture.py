"""Does a checkpoint fit a model? To resume everything must be equal; to grow, only token counts may be larger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megatron_tf.checkpoint.format import CheckpointIndex
from megatron_tf.config.schema import Model
from megatron_tf.errors import CheckpointError, ConfigError
from megatron_tf.params import parameter_table

_TOKENS = "parameter_tokens."


def stored_model(index: CheckpointIndex) -> Model:
    """The model section that the checkpoint was trained with; CheckpointError when it is not a valid one."""
    try:
        return Model.model_validate(dict(index.model))
    except ValidationError as error:
        problems = [f"model.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise CheckpointError(_listed("the checkpoint's own model section is not valid", problems)) from error


def check_same_architecture(index: CheckpointIndex, model: Model) -> None:
    """CheckpointError, naming every differing key with both values, unless `model` is what the checkpoint holds."""
    problems = [f"model.{key}: checkpoint {old}, configuration {new}" for key, old, new in _differences(index, model)]
    if problems:
        remedy = "Restore these keys, or start in another run.dir."
        if all(key.startswith(_TOKENS) for key, _, _ in _differences(index, model)):
            remedy = "Token counts change by growth only: set growth.from to this checkpoint and use another run.dir."
        raise CheckpointError(_listed("the checkpoint is of another architecture", problems) + f"\n{remedy}")
    _check_shapes(index, model)


def check_growable(index: CheckpointIndex, model: Model) -> None:
    """ConfigError, naming every differing key with both values, unless `model` has the checkpoint's architecture
    with more parameter tokens in at least one kind of projection and fewer in none."""
    problems, grows = [], False
    for key, old, new in _differences(index, model):
        if not key.startswith(_TOKENS):
            problems.append(f"model.{key}: checkpoint {old}, configuration {new}. Growth changes token counts only")
        elif new < old:
            problems.append(f"model.{key}: checkpoint {old}, configuration {new}. Growth cannot take tokens away")
        else:
            grows = True
    if any(not problem.startswith(f"model.{_TOKENS}") for problem in problems):
        problems[-1] += (
            ". Models that differ in width, depth, heads or vocabulary never grow into each other; so it is with the "
            "Pile models 150M, 450M, 900M and 1.5B"
        )
    if not problems and not grows:
        problems.append("growth.from: the checkpoint has the configuration's token counts already. Remove `growth`")
    if problems:
        raise ConfigError([problem + "." for problem in problems])
    _check_shapes(index, stored_model(index))


def _differences(index: CheckpointIndex, model: Model) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in the checkpoint, value in the configuration) wherever they differ."""
    old, new = _flatten(stored_model(index).model_dump()), _flatten(model.model_dump())
    for key in new:
        if old[key] != new[key]:
            yield key, old[key], new[key]


def _check_shapes(index: CheckpointIndex, model: Model) -> None:
    """The tensors inside must be those of the architecture that the index claims."""
    expected = {name: spec.shape for name, spec in parameter_table(model).items()}
    found = {name: tensor.shape for name, tensor in index.tensors.items()}
    problems = [
        f"{name}: checkpoint {_shape(found.get(name))}, architecture {_shape(expected.get(name))}"
        for name in {**expected, **found}
        if expected.get(name) != found.get(name)
    ]
    if problems:
        raise CheckpointError(_listed("the checkpoint contradicts its own architecture", problems))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def _listed(head: str, problems: list[str]) -> str:
    return f"{head}:" + "".join(f"\n  - {problem}" for problem in problems)
