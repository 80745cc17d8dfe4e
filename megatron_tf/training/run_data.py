"""The data of a run: checked before its first step, opened by every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_tf.config.schema import DataSource, RunConfig
from megatron_tf.data.documents import Boundaries, find_boundaries
from megatron_tf.data.loader import BatchLoader, build_dataset, check_tokenizer, fingerprint, source_names
from megatron_tf.errors import DataError
from megatron_tf.runtime.agreement import together
from megatron_tf.training.running import Run


@dataclass(frozen=True)
class RunData:
    """`fingerprint`: what the order and the content of the training samples depend on."""

    boundaries: Boundaries
    fingerprint: Mapping[str, Any]


@dataclass(frozen=True)
class Loaders:
    """Of this rank. `validation`: None without data.validation."""

    training: BatchLoader
    validation: BatchLoader | None

    @property
    def held(self) -> BatchLoader:
        """What a model is measured on."""
        return self.validation or self.training


def check_data(stages: Sequence[RunConfig]) -> None:
    """DataError with all that is wrong with the data of all stages: what the last one lacks is said before the first."""
    problems = []
    for config in stages:
        data, model = config.data, config.model
        checks: list[Callable[[], object]] = [
            partial(find_boundaries, data),
            partial(check_tokenizer, (*data.train, *data.validation), data.tokenizer),
            *(
                partial(build_dataset, sources, model.seq_length, config.run.seed, model.vocab_size)
                for sources in (data.train, data.validation)
                if sources
            ),
        ]
        for check in checks:
            try:
                check()
            except DataError as error:
                problems += str(error).splitlines()
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))


def open_data(config: RunConfig) -> RunData:
    """All ranks call it together. DataError, on all of them, for what cannot be read."""
    boundaries = together(lambda: find_boundaries(config.data))
    together(lambda: check_tokenizer((*config.data.train, *config.data.validation), config.data.tokenizer))
    return RunData(boundaries, together(lambda: fingerprint(config.data.train, config.run.seed)))


def open_loaders(run: Run, data: RunData) -> Loaders:
    """All ranks call it together. DataError, on all of them, for what cannot be read."""
    model, topology, plan = run.config.model, run.plan.topology, run.plan.batches

    def loader(sources: Sequence[DataSource]) -> BatchLoader:
        return BatchLoader(
            build_dataset(sources, model.seq_length, run.config.run.seed, model.vocab_size),
            micro_batch_size=plan.micro_batch_size,
            num_micro_batches=plan.num_micro_batches,
            data_rank=topology.coordinate("data", run.rank),
            data_size=topology.data,
            vocab_size=model.vocab_size,
            loss_mask=data.boundaries.loss_mask,
        )

    train, validation = run.config.data.train, run.config.data.validation
    return Loaders(together(lambda: loader(train)), together(lambda: loader(validation) if validation else None))


def unseen_sources(run: Run, validation: BatchLoader) -> list[str]:
    """Validation sources of which an evaluation takes no sample."""
    names, size = source_names(run.config.data.validation), run.plan.batches.global_batch_size
    taken = -(-run.config.evaluation.samples // size) * size
    seen = {validation.dataset.locate(sample)[0] for sample in range(taken)}
    return [name for number, name in enumerate(names) if number not in seen]
