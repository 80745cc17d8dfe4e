"""One step: the mean loss over the learnt tokens of the whole batch, whatever the ranks and micro batches are."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_tf.errors import TrainingError
from megatron_tf.finetuning.batches import IGNORED, Batch, Row, collate, count_targets


@dataclass(frozen=True)
class Computing:
    """How this rank computes. `length`: of packed sequences, None without packing.  `micro_batch`: rows at once."""

    device: torch.device
    rank: int
    world_size: int
    bf16: bool
    length: int | None
    micro_batch: int

    def own_parts(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        """This rank's share of `rows`, in micro batches."""
        own = rows[self.rank :: self.world_size]
        return [own[first : first + self.micro_batch] for first in range(0, len(own), self.micro_batch)]


def summed_loss(model: Any, batch: Batch, computing: Computing) -> Tensor:
    """Σ over the learnt tokens of −log p."""
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
    """(Loss, L2 norm of the gradient) of `rows`, the step's batch; gradients are those of all ranks. TrainingError when
    they are not finite."""
    total = count_targets(rows)
    loss = torch.zeros((), device=computing.device)
    for part in computing.own_parts(rows):
        if count_targets(part):
            own = summed_loss(model, collate(part, computing.length), computing) / total
            own.backward()
            loss += own.detach()
    flat = [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in parameters]
    joined = torch.cat([*flat, loss.view(1)])
    dist.all_reduce(joined)
    norm = joined[:-1].norm().item()
    if not joined.isfinite().all():
        raise TrainingError(
            "the loss or the gradient is infinite or no number: the training diverged. Lower optimizer.lr, or give it "
            "a warm-up, and start again from the last checkpoint"
        )
    for parameter, gradient in zip(parameters, joined[:-1].split([p.numel() for p in parameters])):
        parameter.grad = gradient.view_as(parameter)
    return joined[-1].item(), norm


@torch.no_grad()
def mean_loss(model: Any, rows: Sequence[Row], computing: Computing) -> float:
    """Over the learnt tokens of `rows`, on all ranks."""
    was_training = model.training
    model.eval()
    loss = torch.zeros((), device=computing.device)
    for part in computing.own_parts(rows):
        if count_targets(part):
            loss += summed_loss(model, collate(part, computing.length), computing)
    dist.all_reduce(loss)
    model.train(was_training)
    return loss.item() / count_targets(rows)
