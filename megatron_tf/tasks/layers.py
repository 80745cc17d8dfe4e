"""The interface of a task's layers, loss and metrics, for any tensor-parallel group.

| tensor | local shape |
|---|---|
| inputs, targets | [b, ...], whole on every tensor rank, as the task's data have them |
| hidden between layers | see `model.layers` |
| logits | [..., b, C/T], of this rank's share of the C classes |
| losses | [..., b], whole on every tensor rank |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatron_tf.config.run_plan import BatchPlan
from megatron_tf.config.schema import RunConfig
from megatron_tf.config.sections.model import Model
from megatron_tf.model.layers import TensorParallel, task_layers
from megatron_tf.parallel.groups import Group


class TaskLayers(ABC):
    """The layers, loss and metrics of a task, for all its models."""

    @abstractmethod
    def input_layer(self, model: Model, tensor: TensorParallel) -> nn.Module:
        """A module: inputs -> hidden between layers. The caller initialises its weights."""

    def head(self, model: Model, tensor: TensorParallel) -> nn.Module:
        """A module: hidden between layers, after the final norm -> logits. If tied, it is an input layer again."""
        return self.input_layer(model, tensor)

    def logits(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden between layers -> logits, by `head`. A tied head overrides this, as calling it embeds inputs."""
        return head(hidden)

    def hidden_shape(self, model: Model, inputs: Tensor) -> tuple[int, int]:
        """(s, b) of the whole hidden states of `inputs`."""
        return model.seq_length, inputs.shape[0]

    @abstractmethod
    def checked(self, name: str, inputs: Tensor, model: Model, device: torch.device) -> Tensor:
        """`inputs`, in the type that the input layer takes.

        ArgumentError, with `name`, for inputs that `model` on `device` cannot take.
        """

    @abstractmethod
    def losses(self, model: Model, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        """Losses [..., b], at least fp32, differentiable in the logits; 0 where a loss does not count."""

    @abstractmethod
    def counts(self, targets: Tensor) -> Tensor:
        """The number of losses of each sample that count: int64 [b]."""

    def metrics(self, model: Model, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        """The metrics of each sample, summed over losses that count: [metrics, b], in the order of `Task.metrics`."""
        return logits.new_zeros(0, targets.shape[0], dtype=torch.float32)

    @abstractmethod
    def plain_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum of all losses that count, in plain PyTorch: the reference that every layout is compared with.

        logits [b, ..., C] are whole, as `TokenFormer` gives them.
        """

    @abstractmethod
    def examples(self, config: RunConfig, samples: range) -> tuple[Tensor, Tensor]:
        """Inputs and targets of synthetic samples, each a pure function of the run's seed and its number."""


def example_batches(
    config: RunConfig, plan: BatchPlan, step: int, data_rank: int, data_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro batches (inputs, targets) of one data-parallel rank for `step`, of the task's synthetic samples."""
    layers = task_layers(config.model)
    for micro in range(plan.num_micro_batches):
        first = step * plan.global_batch_size + (micro * data_size + data_rank) * plan.micro_batch_size
        yield layers.examples(config, range(first, first + plan.micro_batch_size))


def loss_sums(losses: Tensor) -> Tensor:
    """Losses [..., b] -> their sum for each sample, [b]."""
    return losses.reshape(-1, losses.shape[-1]).sum(0)


def evaluation_sums(layers: TaskLayers, model: Model, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
    """[2 + metrics, b]: for each sample the sum of its losses, the number that count, and the task's metrics."""
    losses = layers.losses(model, logits, targets, group)
    own = torch.stack((loss_sums(losses), layers.counts(targets).to(losses)))
    return torch.cat((own, layers.metrics(model, logits, targets, group).to(own)))
