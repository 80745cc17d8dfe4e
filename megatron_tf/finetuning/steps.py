"""One step: the mean loss over the learnt tokens of the whole batch, for any number of ranks and any micro batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_tf.errors import TrainingError
from megatron_tf.finetuning.batches import IGNORED, Batch, Row, collate, count_targets
from megatron_tf.finetuning.sharding import is_sharded, local


@dataclass(frozen=True)
class Computing:
    """How this rank computes.

    `bf16`: whether to use autocast.  `length`: of packed sequences [tokens], None without packing.  `micro_batch`: rows
    at once.  `sharded`: whether each rank has a part of the model, so that all must compute together.
    """

    device: torch.device
    rank: int
    world_size: int
    bf16: bool
    length: int | None
    micro_batch: int
    sharded: bool

    def own_parts(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """This rank's share of `rows`, in micro batches."""
        own = rows[self.rank :: self.world_size]
        return [own[first : first + self.micro_batch] for first in range(0, len(own), self.micro_batch)]

    def most_parts(self, rows: Sequence[Row]) -> int:
        """The number of micro batches of the rank that has the most."""
        return -(-len(rows[:: self.world_size]) // self.micro_batch)


def summed_loss(model: Any, batch: Batch, computing: Computing) -> Tensor:
    """Σ −log p over the learnt tokens: fp32 []."""
    device = computing.device
    places = (
        {"position_ids": batch.position_ids}
        if batch.attention_mask is None
        else {"attention_mask": batch.attention_mask}
    )
    targets = batch.targets.to(device)
    with torch.autocast(device.type, torch.bfloat16) if computing.bf16 else contextlib.nullcontext():
        logits = model(
            input_ids=batch.input_ids.to(device),
            use_cache=False,
            **{name: tensor.to(device) for name, tensor in places.items()},
        ).logits
    learnt = targets != IGNORED
    return F.cross_entropy(logits[learnt].float(), targets[learnt], reduction="sum")


def backward(
    model: Any, rows: Sequence[Row], parameters: Sequence[nn.Parameter], computing: Computing
) -> tuple[float, float]:
    """(Mean loss, L2 norm of the gradient) of `rows`, the whole step's batch. Afterwards gradients are summed over all
    ranks. TrainingError when one of the two is not finite."""
    from megatron_tf.adapters.branch import weigh_losses

    total = count_targets(rows)
    loss = torch.zeros((), device=computing.device)
    for part in computing.own_parts(rows):
        weigh_losses(model, len(part) / len(rows))
        # Parts without learnt tokens are computed too, because gathering a sharded layer takes all ranks.
        own = summed_loss(model, collate(part, computing.length), computing) / total
        own.backward()
        loss += own.detach()
    summed, length = _summed(parameters, loss)
    mean, norm = summed.item(), length.item()
    if not math.isfinite(mean + norm):
        raise TrainingError(
            "the loss or the gradient is infinite or no number: the training diverged. Lower optimizer.lr, or give it "
            "a warm-up, and start again from the last checkpoint"
        )
    return mean, norm


def _summed(parameters: Sequence[nn.Parameter], loss: Tensor) -> tuple[Tensor, Tensor]:
    """(Loss, L2 norm of the gradient) over all ranks; sums the gradients over ranks in place.

    For sharded parameters `fully_shard` has summed them already.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [local(parameter.grad) for parameter in parameters]
    if is_sharded(parameters[0]):
        norms = torch.stack(torch._foreach_norm(gradients))
        both = torch.stack([loss, norms.square().sum()])
        dist.all_reduce(both)
        return both[0], both[1].sqrt()
    joined = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.view(1)])
    dist.all_reduce(joined)
    for gradient, summed in zip(gradients, joined[:-1].split([own.numel() for own in gradients])):
        gradient.copy_(summed.view_as(gradient))
    return joined[-1], joined[:-1].norm()


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[Row], computing: Computing) -> float:
    """The mean loss over the learnt tokens of `rows`, the same on all ranks, each of which computes its share."""
    was_training = model.training
    model.eval()
    loss = torch.zeros((), device=computing.device)
    parts = computing.own_parts(rows)
    for part in parts:
        loss += summed_loss(model, collate(part, computing.length), computing)
    if computing.sharded:
        # a rank with fewer parts must take part in gathering the layers all the same
        for _ in range(computing.most_parts(rows) - len(parts)):
            summed_loss(model, collate(rows[:1], computing.length), computing)
    dist.all_reduce(loss)
    model.train(was_training)
    return loss.item() / count_targets(rows)
