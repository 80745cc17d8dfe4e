"""The data of a run: checked before its first step, opened by every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tf.config.run_plan import evaluated_samples
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.data import DataSource
from megatron_tf.data.loader import source_names
from megatron_tf.errors import DataError
from megatron_tf.runtime.agreement import together
from megatron_tf.tasks.data import Loader, OpenData, data_problems, task_data
from megatron_tf.training.running import Run


@dataclass(frozen=True)
class RunData:
    """`fingerprint`: the facts that decide the order and content of the training samples."""

    opened: OpenData
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True)
class Loaders:
    """The loaders of this rank. `data`: opens more of them.  `validation`: None without data.validation."""

    data: OpenData
    training: Loader
    validation: Loader | None

    @property
    def held(self) -> Loader:
        """The loader for measurements of the model."""
        return self.validation or self.training


def check_data(stages: Sequence[RunConfig]) -> None:
    """DataError with the problems of the data of all stages, so that the last stage's are reported before the first one
    trains."""
    if problems := [problem for config in stages for problem in data_problems(config)]:
        raise DataError("\n".join(dict.fromkeys(problems)))


def open_data(config: RunConfig) -> RunData:
    """All ranks call it together. DataError, on all of them, for what cannot be read."""
    opened = together(lambda: task_data(config.model).open(config))
    return RunData(opened, together(opened.fingerprint))


def open_loaders(run: Run, data: RunData) -> Loaders:
    """All ranks call it together. DataError, on all of them, for what cannot be read."""
    topology, plan = run.plan.topology, run.plan.batches

    def loader(sources: Sequence[DataSource], training: bool) -> Loader:
        return data.opened.loader(
            sources,
            micro_batch_size=plan.micro_batch_size,
            num_micro_batches=plan.num_micro_batches,
            data_rank=topology.coordinate("data", run.rank),
            data_size=topology.data,
            training=training,
        )

    train, validation = run.config.data.train, run.config.data.validation
    return Loaders(
        data.opened,
        together(lambda: loader(train, True)),
        together(lambda: loader(validation, False) if validation else None),
    )


def unseen_sources(run: Run, validation: Loader) -> list[str]:
    """Validation sources of which an evaluation takes no sample."""
    names = source_names(run.config.data.validation)
    seen = {validation.source_of(sample) for sample in range(evaluated_samples(run.config))}
    return [name for number, name in enumerate(names) if number not in seen]
