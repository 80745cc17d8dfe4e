"""The interface of a task to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from megatron_tf.architectures.spec import ParameterSpec
from megatron_tf.architectures.work import Collectives, Product
from megatron_tf.config.nearest import either, multiples_near
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model


@dataclass(frozen=True)
class EndsWork:
    """The work of a task's layers on one micro batch, on the fullest tensor rank.

    `input_products`, `head_products`: of the forward pass; the backward pass has two for each.
    `logits`: elements of the head's output.
    """

    input_products: tuple[Product, ...]
    head_products: tuple[Product, ...]
    logits: int


class Task(ABC):
    """The purpose of a model: the layers before and after its blocks, its loss, and its data.

    Everything here is arithmetic without torch. Objects that need torch are given by name and imported on first use.

    `section`: the type of its part of the `model:` section of a configuration.
    `layers`: "module:object", a `tasks.layers.TaskLayers`.
    `data`: "module:object", a `tasks.data.TaskData`.
    `evaluation`: "module:object", an `evaluation.loaded.TaskEvaluation`; "" where `evaluate` does not support the task.
    `prepared_by`: the tool that writes its data.
    `causal`: whether a position sees only those before it.
    `splits_samples`: whether ranks can share a sample: inputs and targets are [b, s], one for each position.
    `input_name`, `head_name`: of the two modules; the names of their parameters begin with them. Equal names are one
        (tied) module, on the first and the last pipeline stage, with one parameter, `weight`.
    `unit`: the unit of a run's speed: "tokens", or the name of samples, such as "images".
    `metrics`: names of the results of `TaskLayers.metrics`; evaluation logs the mean of each.
    `own_keys`: keys outside the `model:` section that only this task uses, such as "data.tokenizer". Their defaults
        must mean that they are not used.
    `why_not_elsewhere`: the reason, as a clause, why keys of other tasks mean nothing to it.
    `formats`: the foreign formats that its models can be exported to and imported from, if the architecture has them.
    """

    section: ClassVar[type[Model]]
    layers: ClassVar[str]
    data: ClassVar[str]
    evaluation: ClassVar[str] = ""
    prepared_by: ClassVar[str] = "tools/preprocess_data.py"
    causal: ClassVar[bool]
    splits_samples: ClassVar[bool] = False
    input_name: ClassVar[str]
    head_name: ClassVar[str]
    unit: ClassVar[str] = "tokens"
    metrics: ClassVar[tuple[str, ...]] = ()
    own_keys: ClassVar[tuple[str, ...]] = ()
    formats: ClassVar[frozenset[str]] = frozenset()
    why_not_elsewhere: ClassVar[str] = "another task has this key"

    @property
    def tied(self) -> bool:
        """Whether head and input layer are the same module."""
        return self.input_name == self.head_name

    @abstractmethod
    def input_parameters(self, model: Model) -> Iterator[ParameterSpec]:
        """The parameters of the input layer, which may be the tied head, named "<input_name>.…"."""

    def head_parameters(self, model: Model) -> Iterator[ParameterSpec]:
        """The parameters of a head that is not tied, named "<head_name>.…"."""
        return iter(())

    @abstractmethod
    def sharded_rows(self, model: Model) -> dict[str, int]:
        """Key of the configuration -> rows that are split over the tensor ranks; each rank needs one at least."""

    @abstractmethod
    def describe(self, model: Model) -> str:
        """The sizes that only this task has, as a short text."""

    @abstractmethod
    def losses_per_sample(self, model: Model) -> int:
        """The number of losses of a sample when all of them count; the mean is taken over them."""

    @abstractmethod
    def multiply_adds(self, model: Model) -> int:
        """Multiply-adds of the input layer and the head in the forward pass of one sample."""

    @abstractmethod
    def work(self, config: RunConfig) -> EndsWork:
        """Products and memory of the input layer and the head, for one micro batch on the fullest tensor rank."""

    @abstractmethod
    def collectives(self, config: RunConfig) -> tuple[tuple[Collectives, Collectives], tuple[Collectives, Collectives]]:
        """((forward, backward) of the input layer, (forward, backward) of head and loss).

        They are the collectives of a micro batch over two or more tensor ranks, without those of the final norm.
        """

    def length(self, model: Model) -> str:
        """The key that gives the positions of a sample, and their number, as the beginning of a sentence."""
        return f"model.seq_length: {model.seq_length} is"

    def length_remedy(self, model: Model, multiple: int) -> str:
        """A remedy for a seq_length that is not a multiple of `multiple`, as the first half of a sentence."""
        return f"Set it to {either(multiples_near(model.seq_length, multiple))}"

    def masks_losses(self, config: RunConfig) -> bool:
        """Whether there may be losses of a sample that do not count."""
        return False

    def problems(self, model: Model) -> Iterator[str]:
        """Sentences on fields of the model that do not fit together, beyond the checks for every model."""
        return iter(())

    def run_problems(self, config: RunConfig) -> Iterator[str]:
        """Sentences on a run's settings that the task cannot work with."""
        return iter(())

    def unit_length(self, model: Model) -> int:
        """The number of positions of one `unit`."""
        return 1 if self.unit == "tokens" else model.seq_length

    def in_units(self, model: Model, positions: float) -> float:
        """A number of positions, converted to the task's `unit`."""
        return positions / self.unit_length(model)

    def in_words(self, loss: float, metrics: Mapping[str, float]) -> str:
        """The results of an evaluation as text for the console."""
        return "  ".join([f"loss {loss:.4f}", *(f"{name} {value:.4f}" for name, value in metrics.items())])
