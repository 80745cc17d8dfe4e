"""What a task gives that needs torch: its layers, its loss and its metrics, for any tensor-parallel group.

| tensor | local shape |
|---|---|
| inputs, targets | [b, ...], whole on every tensor rank, as the task's data gives them |
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
    """Of all models of a task."""

    @abstractmethod
    def input_layer(self, model: Model, tensor: TensorParallel) -> nn.Module:
        """A module: inputs -> hidden between layers. Its weights are still to be written."""

    def head(self, model: Model, tensor: TensorParallel) -> nn.Module:
        """A module: hidden between layers, behind the final norm -> logits. A tied one is the input layer."""
        return self.input_layer(model, tensor)

    def logits(self, head: nn.Module, hidden: Tensor) -> Tensor:
        """What `head` makes of hidden between layers; a tied one by another method than the input layer's."""
        return head(hidden)

    def hidden_shape(self, model: Model, inputs: Tensor) -> tuple[int, int]:
        """(s, b) of the whole hidden states that `inputs` become."""
        return model.seq_length, inputs.shape[0]

    @abstractmethod
    def checked(self, name: str, inputs: Tensor, model: Model, device: torch.device) -> Tensor:
        """`inputs` as the input layer takes them.

        ArgumentError, under `name`, for what `model` on `device` cannot read.
        """

    @abstractmethod
    def losses(self, model: Model, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        """At least fp32, with gradient; 0 where a loss does not count."""

    @abstractmethod
    def counts(self, targets: Tensor) -> Tensor:
        """Whole numbers [b]: how many losses of each sample count."""

    def metrics(self, model: Model, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
        """[metrics, b], in the order of `Task.metrics`: of each sample the sum over the losses that count."""
        return logits.new_zeros(0, targets.shape[0], dtype=torch.float32)

    @abstractmethod
    def plain_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum of all losses that count, in plain PyTorch: what every layout is compared with.

        logits [b, ..., C] are whole, as `TokenFormer` gives them.
        """

    @abstractmethod
    def examples(self, config: RunConfig, samples: range) -> tuple[Tensor, Tensor]:
        """Inputs and targets of made-up samples, each a pure function of the run's seed and its number."""


def example_batches(
    config: RunConfig, plan: BatchPlan, step: int, data_rank: int, data_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro batches of one data-parallel rank for `step`, made up by the task."""
    layers = task_layers(config.model)
    for micro in range(plan.num_micro_batches):
        first = step * plan.global_batch_size + (micro * data_size + data_rank) * plan.micro_batch_size
        yield layers.examples(config, range(first, first + plan.micro_batch_size))


def loss_sums(losses: Tensor) -> Tensor:
    """Losses [..., b] -> of each sample the sum, [b]."""
    return losses.reshape(-1, losses.shape[-1]).sum(0)


def evaluation_sums(layers: TaskLayers, model: Model, logits: Tensor, targets: Tensor, group: Group) -> Tensor:
    """[2 + metrics, b]: of each sample the summed loss, how many losses count, and the task's metrics."""
    losses = layers.losses(model, logits, targets, group)
    own = torch.stack((loss_sums(losses), layers.counts(targets).to(losses)))
    return torch.cat((own, layers.metrics(model, logits, targets, group).to(own)))
