"""The self-proof of a growth: the smaller and the grown model must agree on a held batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.config.sections.training import ComputeType
from megatron_tf.errors import CheckpointError
from megatron_tf.model.stage import Stage
from megatron_tf.tasks.data import Batch
from megatron_tf.training.choices import Followed

# The largest share of choices among candidates that may differ, because scores are equal to rounding.
CHOICE_TOLERANCE: dict[ComputeType, float] = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 3e-2}
# The rounding of one forward pass, relative to the largest logit. The old and the new product sum the same numbers in
# another order. bf16 has 8 bits of mantissa, whose error grows over a few layers.
LOGIT_TOLERANCE: dict[ComputeType, float] = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}


@dataclass(frozen=True)
class Probe:
    """A model's answer on the held batches: `loss` over all ranks, `logits` of one micro batch on last-stage ranks."""

    loss: float
    logits: Tensor | None


@torch.no_grad()
def probe(stage: Stage, batches: Sequence[Batch]) -> Probe:
    """All ranks must call it, with the same number of batches. `stage`: this rank's part of the model."""
    device = next(stage.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    first: Tensor | None = None
    layers = stage.task_layers
    for inputs, targets in batches:
        logits = stage.infer(inputs.to(device))
        if logits is None:
            continue
        group, targets = stage.tensor.group, stage.tensor.own_positions(targets)
        losses = layers.losses(stage.model, logits, targets.to(device), group)
        if group.rank == 0:
            totals += torch.stack((losses.sum(dtype=torch.float64), layers.counts(targets).sum().to(totals)))
        first = logits.float().cpu() if first is None else first
    dist.all_reduce(totals)
    loss, counted = totals.tolist()
    return Probe(loss / max(1.0, counted), first)


def compare(
    before: Probe, after: Probe, followed: Followed, precision: ComputeType, device: torch.device, preserves: bool
) -> str:
    """Compares two probes, and returns a sentence for the log.

    `followed`: from the pass of `after`, on this rank.

    `preserves`: whether the growth must keep the function. Then CheckpointError, on all ranks, when the models differ
    beyond rounding.
    """
    pair = torch.zeros(2, dtype=torch.float64, device=device)
    if before.logits is not None and after.logits is not None:
        pair[0] = (after.logits - before.logits).abs().max()
        pair[1] = before.logits.abs().max()
    dist.all_reduce(pair, op=dist.ReduceOp.MAX)
    difference, scale = pair.tolist()
    text = (
        f"held batch: loss {before.loss:.7f} before, {after.loss:.7f} after; logits differ by at most "
        f"{difference:.2e}, the largest is {scale:.2f}"
    )
    counts = torch.tensor([followed.total, followed.elsewhere], dtype=torch.int64, device=device)
    dist.all_reduce(counts)
    total, elsewhere = counts.tolist()
    if elsewhere:
        text += (
            f"; {elsewhere:,} of {total:,} choices among candidates are so close that rounding decides them, and "
            "follow the smaller model here"
        )
    if not preserves:
        return f"{text}; this growth does not claim to keep the function"
    same_choices = elsewhere <= CHOICE_TOLERANCE[precision] * total
    if not same_choices or not difference <= LOGIT_TOLERANCE[precision] * scale:
        raise CheckpointError(f"the growth changed the function, so the run stops. {text}")
    return text
