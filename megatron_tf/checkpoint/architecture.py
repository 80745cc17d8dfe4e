"""Whether a checkpoint fits a model. To resume, everything must be equal; to grow, sizes may be larger."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_tf.checkpoint.format import CheckpointIndex
from megatron_tf.checkpoint.records import record_problems
from megatron_tf.config.activations import ACTIVATIONS
from megatron_tf.config.architectures import ARCHITECTURES, architecture_of, with_parameter_tokens
from megatron_tf.config.differences import SPARSE, TOKENS, differing
from megatron_tf.config.lookup import key_name
from megatron_tf.config.mistakes import reason
from megatron_tf.config.nearest import either
from megatron_tf.config.optimizers import DEFAULT, OPTIMIZERS
from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import TASKS, task_of
from megatron_tf.errors import CheckpointError, shown
from megatron_tf.state.optimizer_states import WEIGHT
from megatron_tf.state.parameters import parameter_table, projections
from megatron_tf.telemetry.text import bullets


def stored_model(index: CheckpointIndex) -> Model:
    """The model section that the checkpoint was trained with.

    CheckpointError when it is not a valid one, when weights or scales are missing for it, or too many, or when the
    checkpoint's own history contradicts itself.
    """
    try:
        model = Model.model_validate(dict(index.model))
    except ValidationError as error:
        problems = [
            f"{key_name(('model', *found['loc']))} {reason(found)}"
            + ("" if found["type"] == "missing" else f", here {shown(found['input'])}")
            for found in error.errors()
        ]
        raise CheckpointError(_listed("the checkpoint's own model section is not valid", problems)) from error
    history = record_problems(index.growth_history, index.data, index.run, index.tokens, complete=True)
    history = history or list(_other_kinds(index, model)) or list(_other_candidates(index, model))
    if problems := [*_contradictions(index, model), *history]:
        raise CheckpointError(_listed("the checkpoint contradicts its own model section", problems))
    return model


def token_counts(model: Model, action: str) -> dict[str, int]:
    """The model's token counts by kind, for an `action` ("pruned") on them; CheckpointError when it has none."""
    counts = architecture_of(model).token_counts(model)
    if not counts:
        raise CheckpointError(
            f"a {model.architecture} cannot be {action}, because it has no parameter tokens. Give a model whose "
            f"model.architecture is {either(with_parameter_tokens())}"
        )
    return counts


def check_prunable(model: Model, counts: Mapping[str, int]) -> None:
    """CheckpointError unless each projection that would lose tokens is one list of them that all positions use.

    `counts`: tokens by kind of projection afterwards.
    """
    problems, banks = [], {}
    for projection in projections(model).values():
        kind = projection.kind
        if counts[kind] == projection.tokens:
            continue
        if bank := projection.bank:
            banks[kind] = (
                f"model.sparse.{kind}: the {kind} projections cannot lose some of their {projection.tokens} tokens, "
                f"because positions choose {bank.used_tokens} of them among {bank} tokens"
            )
        elif (projection.keys, projection.values) != (("key_tokens",), ("value_tokens",)):
            problems.append(
                f"the {kind} projections cannot be pruned, because their tokens are "
                f"{', '.join(projection.keys + projection.values)}. Give a model whose tokens are key_tokens and "
                "value_tokens alone"
            )
    if banks:
        fewer = ",".join(f"{kind}=1" for kind in banks)
        ones = "these projections" if len(banks) > 1 else "the projection"
        problems.append(
            "\n".join(banks.values()) + f". Give --candidates {fewer}, which makes {ones} dense, and prune that model"
        )
    if problems:
        raise CheckpointError("\n".join(dict.fromkeys(problems)))


def check_format(model: Model, form: str, action: str) -> None:
    """CheckpointError unless task, architecture and activations have a place in the foreign format `form`."""
    if form not in task_of(model).formats:
        able = [name for name in TASKS.names() if form in TASKS[name].formats]
        raise CheckpointError(
            f"a model of the task {model.task} cannot be {action}: the {form} format has no place for it. Give a model "
            f"whose model.task is {either(able)}"
        )
    if form not in architecture_of(model).formats:
        able = [name for name in ARCHITECTURES.names() if form in ARCHITECTURES[name].formats]
        raise CheckpointError(
            f"a {model.architecture} cannot be {action}: the {form} format has no place for its parameters. Give a "
            f"model whose model.architecture is {either(able)}"
        )
    if problem := architecture_of(model).format_problem(model, form):
        raise CheckpointError(f"the model cannot be {action}: {problem}")
    for activation in {spec.activation for spec in projections(model).values()}:
        if form not in ACTIVATIONS[activation].formats:
            able = [name for name in ACTIVATIONS.names() if form in ACTIVATIONS[name].formats]
            raise CheckpointError(
                f"a model of model.activation {activation} cannot be {action}: code for the {form} format does not "
                f"compute it. Give a model whose model.activation is {either(able)}"
            )


def check_same_architecture(
    index: CheckpointIndex, model: Model, optimizer: str = DEFAULT, place: str | Path = "the checkpoint", key: str = ""
) -> None:
    """CheckpointError, with every differing key and both values, unless the checkpoint is of `model` and has the states
    of `optimizer`, a name of the configuration.

    `place`: of the checkpoint, to name it.  `key`: with which the configuration names it; "" for one in run.dir.
    """
    named = f"{key}: {place}" if key else place
    differences = list(_differences(index, model))
    if differences:
        problems = [f"model.{name}: checkpoint {old}, configuration {new}" for name, old, new in differences]
        otherwise = f"remove {key}" if key else "start in another run.dir"
        by_growth = remedy_by_growth(differences, f"remove {key}" if key else "use another run.dir")
        remedy = f"Restore these keys. {by_growth}" if by_growth else f"Restore these keys, or {otherwise}."
        raise CheckpointError(_listed(f"{named} is of another architecture", problems) + f"\n{remedy}")
    if problem := optimizer_problem(index, optimizer, "begin a new run with its weights by training.init_from"):
        raise CheckpointError(f"{named} cannot be {'branched off' if key else 'resumed'}: {problem}")


def remedy_by_growth(differences: Sequence[tuple[str, Any, Any]], otherwise: str) -> str | None:
    """The remedy for other token counts or candidates than the checkpoint's; None if other keys differ, too.

    `otherwise`: the end of a sentence, what growth from the checkpoint needs besides its own keys.
    """
    if not all(name.startswith((TOKENS, SPARSE)) for name, _, _ in differences):
        return None
    sparse = [change for change in differences if change[0].startswith(SPARSE)]
    if not sparse:
        return f"Token counts change by growth only: set growth.from to this checkpoint and {otherwise}."
    counts = [(old, new) for name, old, new in sparse if name.endswith(".candidates") and "null" not in (old, new)]
    if all(old == "null" for _, old, _ in sparse):
        way = "Candidates come by growth only: set growth.from to this checkpoint, growth.method to split or bank, and"
    elif len(counts) == len(sparse) and all(new > old and new % old == 0 for old, new in counts):
        way = "Candidates are split by growth only: set growth.from to this checkpoint, growth.method to split, and"
    else:
        return (
            "Other candidates are made by a growth by split, which makes multiples of their number "
            "and keeps their size, or by megatron_tf prune, which makes fewer; with 1 a projection is dense."
        )
    return f"{way} {otherwise}."


def optimizer_problem(index: CheckpointIndex, optimizer: str, otherwise: str) -> str | None:
    """Why `optimizer`, a name of the configuration, cannot resume from the states in the checkpoint; None if it can.
    `otherwise`: the remedy for users who want to keep the optimizer.
    """
    needed = OPTIMIZERS[optimizer].state_names[1:]
    held = [state for state in index.states if state != WEIGHT]
    if set(needed) == set(held):
        return None
    able = [name for name in OPTIMIZERS.names() if held and set(OPTIMIZERS[name].state_names[1:]) == set(held)]
    choice = (
        f"Set optimizer.type to {either(able)}, or {otherwise}." if able else f"{otherwise[0].upper()}{otherwise[1:]}."
    )
    return (
        f"{optimizer} keeps {' and '.join(needed) or 'nothing'} in addition to the weights, and the checkpoint has "
        f"{' and '.join(held) or 'weights alone'}. {choice}"
    )


def check_evaluable(index: CheckpointIndex, model: Model) -> None:
    """CheckpointError, with every differing key and both values, unless the checkpoint is of `model`.

    seq_length may differ, because no weight depends on it.
    """
    problems = [
        f"model.{key}: checkpoint {old}, configuration {new}"
        for key, old, new in _differences(index, model)
        if key != "seq_length"
    ]
    if problems:
        raise CheckpointError(
            _listed("the checkpoint holds another model", problems)
            + "\nGive the configuration of its run, such as the config.yml in the run's folder, or set these keys to "
            "the checkpoint's values."
        )


def _differences(index: CheckpointIndex, model: Model) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in the checkpoint, value in the configuration) wherever they differ."""
    return differing(stored_model(index), model)


def _contradictions(index: CheckpointIndex, model: Model) -> Iterator[str]:
    """Problems with tensors and scales that are not those of the architecture in the index."""
    expected = {name: spec.shape for name, spec in parameter_table(model).items()}
    found = {name: tensor.shape for name, tensor in index.tensors.items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            yield f"{name}: checkpoint {_shape(found.get(name))}, architecture {_shape(expected.get(name))}"
        elif WEIGHT not in _states(index, name):
            yield f"{name}: no {WEIGHT}"
    scaled = projections(model)
    yield from (f"{name}: no scale" for name in scaled if name not in index.scales)
    yield from (f"{name}: a scale, but no such projection" for name in index.scales if name not in scaled)
    # A checkpoint of weights alone is valid, but no tensor may lack a state that others have.
    for state in dict.fromkeys(state for name in found for state in _states(index, name) if state != WEIGHT):
        yield from (f"{name}: no {state}, unlike other tensors" for name in found if state not in _states(index, name))


def _other_kinds(index: CheckpointIndex, model: Model) -> Iterator[str]:
    """Problems with entries of the history whose projections the model does not have, or from whose layers or widths it
    cannot have grown."""
    kinds = architecture_of(model).token_counts(model).keys()
    for number, entry in enumerate(index.growth_history):
        for key in ("from", "to"):
            if entry[key].keys() != kinds:
                yield f"growth_history.{number}.{key} has {shown(list(entry[key]))}, the model {shown(list(kinds))}"
    layers = model.num_layers
    for number, entry in reversed(list(enumerate(index.growth_history))):
        if (grown := entry.get("layers")) is not None:
            if grown["to"] != layers:
                yield f"growth_history.{number}.layers.to is {grown['to']}, the model then had {layers} layers"
            layers = grown["from"]
    sizes = model.model_dump()
    for number, entry in reversed(list(enumerate(index.growth_history))):
        if (cloned := entry.get("width")) is not None:
            for key, size in cloned["to"].items():
                if sizes.get(key) != size:
                    yield f"growth_history.{number}.width.to.{key} is {size}, the model then had {sizes.get(key)}"
            sizes |= cloned["from"]


def _other_candidates(index: CheckpointIndex, model: Model) -> Iterator[str]:
    """A problem with the newest entry of the history from whose candidates the model cannot have grown."""
    architecture = architecture_of(model)
    for number, entry in reversed(list(enumerate(index.growth_history))):
        if (changed := entry.get("sparse")) is None:
            continue
        place = f"growth_history.{number}.sparse"
        if "sparse" not in type(model).model_fields:
            yield f"{place} has candidates, a {model.architecture} none"
            return
        try:
            after = architecture.with_sparse(model, changed["to"])
            before = architecture.with_sparse(model, changed["from"])
        except ValidationError:
            yield f"{place} has {shown(changed)}, which is no section model.sparse before and after"
            return
        if after != model:
            yield (
                f"{place}.to has {shown(changed['to'])}, the model then had "
                f"{shown(architecture.sparse_sections(model))}"
            )
            return
        if problems := list(architecture.problems(architecture.with_token_counts(before, entry["from"]))):
            yield f"{place}.from: {problems[0]}"
            return
        model = before


def _states(index: CheckpointIndex, name: str) -> Collection[str]:
    return index.tensors[name].states


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def _listed(head: str, problems: list[str]) -> str:
    return f"{head}:{bullets(problems)}"
