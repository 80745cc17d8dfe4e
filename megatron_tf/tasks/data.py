"""What a task gives that reads data: the batches of a run, and what its numbers mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pkgutil import resolve_name
from typing import Any, Protocol

from torch import Tensor

from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.data import DataSource
from megatron_tf.config.sections.model import Model
from megatron_tf.config.tasks import task_of

Batch = tuple[Tensor, Tensor]  # inputs and targets of a micro batch, [b, ...] each


class Loader(Protocol):
    """The micro batches of one data-parallel rank. What a step reads follows from its first sample."""

    def step_batches(self, first_sample: int) -> Iterator[Batch]:
        """All micro batches of a step, whose samples are the same ones whatever the layout.

        Micro batch m of b samples takes first_sample + (m·data_size + data_rank)·b + [0, b). DataError for what cannot
        be read.
        """
        ...

    def sample_sources(self, first_sample: int) -> list[int]:
        """Number of the source of each sample of `step_batches`, in their order."""
        ...

    def source_of(self, sample: int) -> int:
        """Number of the source that a sample is of."""
        ...


class OpenData(ABC):
    """The data of one run. `document_ends`: the input tokens after which attention begins anew."""

    document_ends: tuple[int, ...] = ()

    @abstractmethod
    def loader(
        self,
        sources: Sequence[DataSource],
        *,
        micro_batch_size: int,
        num_micro_batches: int,
        data_rank: int = 0,
        data_size: int = 1,
        training: bool = False,
    ) -> Loader:
        """Of data.train or data.validation. DataError for what cannot be read.

        `training`: samples are to be learned from, and not to be measured on.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What the order and the content of the training samples depend on, as a JSON object."""

    @abstractmethod
    def outlook(self, samples: int) -> tuple[str, list[str]]:
        """For a run over `samples` training samples in all: the data in a line, and warnings."""

    def epoch(self, samples: int) -> float | None:
        """How often `samples` samples are all that there is to train on; None where nobody counts so."""
        return None


class TaskData(ABC):
    """Of all models of a task."""

    @abstractmethod
    def checks(self, config: RunConfig) -> list[Callable[[], object]]:
        """Each raises DataError for some of what is wrong with the run's data; together, for all of it."""

    @abstractmethod
    def open(self, config: RunConfig) -> OpenData:
        """DataError for what cannot be read."""

    def in_other_numbers(self, sources: Sequence[DataSource]) -> Callable[[float], dict[str, float]]:
        """From a mean loss on `sources` to what it means in other numbers, by name, for the log."""
        return lambda loss: {}


def task_data(model: Model) -> TaskData:
    """The data of the model's task."""
    return resolve_name(task_of(model).data)
