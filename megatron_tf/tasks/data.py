"""The interface of a task's data: the batches of a run, and the meaning of its losses."""

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
from megatron_tf.errors import DataError

Batch = tuple[Tensor, Tensor]  # inputs and targets of a micro batch, [b, ...] each


class Loader(Protocol):
    """The micro batches of one data-parallel rank. They depend only on the number of a step's first sample."""

    def step_batches(self, first_sample: int) -> Iterator[Batch]:
        """All micro batches of a step. Over all ranks, its samples are the same at every layout.

        Micro batch m of b samples takes first_sample + (m·data_size + data_rank)·b + [0, b). DataError when they cannot
        be read.
        """
        ...

    def sample_sources(self, first_sample: int) -> list[int]:
        """The number of the source of each sample of `step_batches`, in their order."""
        ...

    def source_of(self, sample: int) -> int:
        """The number of the source that contains this sample."""
        ...


class OpenData(ABC):
    """The data of one run.

    `document_ends`: the input tokens that end a document; attention does not cross them.
    """

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
        """The loader of `sources`, which are data.train or data.validation. DataError when they cannot be read.

        `training`: the samples are for training and not for evaluation.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides the order and the content of the training samples, as a JSON object."""

    @abstractmethod
    def outlook(self, samples: int) -> tuple[str, list[str]]:
        """(the data in one line, warnings) for a run over `samples` training samples in all."""

    def epoch(self, samples: int) -> float | None:
        """The number of epochs in `samples` training samples; None for a task that does not count in epochs."""
        return None


class TaskData(ABC):
    """The data of a task, for all its models."""

    @abstractmethod
    def checks(self, config: RunConfig) -> list[Callable[[], object]]:
        """Functions that raise DataError: each finds some of the problems of the run's data, all together find all."""

    @abstractmethod
    def open(self, config: RunConfig) -> OpenData:
        """Opens the run's data. DataError when they cannot be read."""

    def in_other_numbers(self, sources: Sequence[DataSource]) -> Callable[[float], dict[str, float]]:
        """A function from a mean loss on `sources` to the same result in other numbers, by name, for the log."""
        return lambda loss: {}


def data_problems(config: RunConfig) -> list[str]:
    """What is wrong with the run's data, each problem once."""
    problems: list[str] = []
    for check in task_data(config.model).checks(config):
        try:
            check()
        except DataError as error:
            problems += str(error).splitlines()
    return list(dict.fromkeys(problems))


def task_data(model: Model) -> TaskData:
    """The data of the model's task."""
    return resolve_name(task_of(model).data)
