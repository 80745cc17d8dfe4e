"""Growing a checkpoint. The trainer and the tool both use these functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tf.checkpoint.architecture import optimizer_problem, stored_model
from megatron_tf.checkpoint.fingerprint import same_data
from megatron_tf.checkpoint.format import CheckpointIndex
from megatron_tf.checkpoint.reader import CheckpointReader
from megatron_tf.checkpoint.source import CheckpointSource
from megatron_tf.config.optimizers import DEFAULT, OPTIMIZERS
from megatron_tf.config.sections.growth import Growth
from megatron_tf.config.sections.model import Model
from megatron_tf.config.validate import check_model
from megatron_tf.errors import ConfigError
from megatron_tf.growth.rules import DEFAULTS, growth_problems
from megatron_tf.growth.source import GrownSource, growth_entry, growth_seed
from megatron_tf.state.optimizer_states import WEIGHT
from megatron_tf.state.sources import InitialSource, StepZero


def grow(
    reader: CheckpointReader,
    model: Model,
    growth: Growth,
    *,
    seed: int,
    data: Mapping[str, Any] | None,
    optimizer: str = DEFAULT,
) -> StepZero:
    """The bigger `model`, grown from an open checkpoint.

    `seed`: the run's.  `data`: fingerprint of the training data of the bigger model. If it equals that of the smaller
    one, or is None, reading goes on where the smaller one stopped; otherwise it begins at the first sample.
    `optimizer`: of the bigger model, a name of the configuration.
    ConfigError, with all problems, when `model` is not valid, growth does not lead from the one model to the other, a
    method cannot grow this model, or states are to be kept that `optimizer` does not know.
    """
    check_model(model)
    index = reader.index
    check_growable(index, model, growth)
    keeps = index.states != (WEIGHT,) and growth.moments == "keep"
    if keeps and (problem := optimizer_problem(index, optimizer, "set growth.moments to reset")):
        raise ConfigError(f"growth.moments: they are to be kept, but {problem}")
    source = grown_source(reader, model, growth, seed)
    entry = growth_entry(
        method=source.record["method"],
        moments=growth.moments,
        source=str(reader.path),
        step=index.step,
        samples=index.samples,
        tokens=index.tokens,
        old_model=stored_model(index),
        new_model=model,
    )
    entry |= {**source.record, "noise": growth.noise, "preserves": source.preserves}
    goes_on = data is None or same_data(index.data, data)
    samples, states = index.samples if goes_on else 0, OPTIMIZERS[optimizer].state_names
    return StepZero(source, samples, index.tokens, (*index.growth_history, entry), states)


def grown_source(reader: CheckpointReader, model: Model, growth: Growth, seed: int) -> GrownSource:
    """The state of the bigger `model`, grown from an open checkpoint as `growth` says.

    `seed` is the run's; new tokens depend on it and on how many growths came before. ConfigError when a
    method cannot grow this model; see `check_growable` for what may differ between the two models.
    """
    own_seed = growth_seed(seed, len(reader.index.growth_history) + 1)
    return GrownSource(
        CheckpointSource(reader),
        InitialSource(model, own_seed),
        old_model=stored_model(reader.index),
        new_model=model,
        growth=growth,
        seed=own_seed,
    )


def check_growable(index: CheckpointIndex, model: Model, growth: Growth = DEFAULTS) -> None:
    """ConfigError unless the checkpoint's model can grow into `model`, see `growth_problems`."""
    if problems := growth_problems(stored_model(index), model, growth):
        raise ConfigError(problems)
