"""Peak memory of a training step on one device, by kind, against the estimate.

The estimate is for a GPU. A CPU gathers rows of one candidate after the other in bf16 as well, so there a model with
candidates takes less.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tf.benchmark.counting import Counting
from megatron_tf.benchmark.report import Row
from megatron_tf.config.schema import RunConfig
from megatron_tf.costs.estimate import memory_per_rank
from megatron_tf.model import build_model
from megatron_tf.model.layers import Block
from megatron_tf.model.precision import DTYPES
from megatron_tf.model.projection import choose_forms
from megatron_tf.parallel.groups import SINGLE
from megatron_tf.tasks.classes import cross_entropy


def rows(device: torch.device, config: RunConfig) -> Iterator[Row]:
    """State, activations and both, in bytes. `config` is valid for one process.

    The state is laid out as the trainer lays it out for bf16: weights and gradients in the compute type, their fp32
    sums, fp32 master weights and two Adam moments. In fp32, sums are the gradients of one part and masters a copy.
    """
    estimated = memory_per_rank(config, 1)
    state = estimated.weights + estimated.gradients + estimated.optimizer
    measured_state, peak = _measure(device, config)
    pairs = {
        "state": (measured_state, state),
        "activations": (peak - measured_state, estimated.activations),
        "peak": (peak, estimated.total),
    }
    for kind, (measured, expected) in pairs.items():
        yield {
            "norm": config.training.norm,
            "scores": config.training.scores,
            "kind": kind,
            "measured MB": measured / 1e6,
            "estimated MB": expected / 1e6,
            "measured / estimated": measured / expected,
        }


def _measure(device: torch.device, config: RunConfig) -> tuple[int, int]:
    """(bytes of state, peak of the second step): on a GPU as its allocator counts, else tensors alive."""
    ids = torch.zeros(config.training.micro_batch_size, config.model.seq_length, dtype=torch.int64, device=device)
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    with Counting() as counted:
        model = build_model(config.model, device=device, dtype=DTYPES[config.training.compute_type])
        for block in model.blocks:
            assert isinstance(block, Block)
            block.recompute = config.training.activation_checkpointing
            choose_forms(block, config.training, device.type)
        weights = list(model.parameters())
        masters = [weight.detach().float().clone() for weight in weights]
        sums = [torch.zeros_like(master) for master in masters]
        for weight, master, total in zip(weights, masters, sums):
            weight.grad, master.grad = torch.zeros_like(weight), total
        adam = torch.optim.AdamW(masters, fused=True)

        def step() -> None:
            cross_entropy(model(ids).transpose(0, 1), ids.mT, 0, SINGLE).mean().backward()
            with torch.no_grad():
                for weight, total in zip(weights, sums):
                    total.add_(gradient_of(weight))
                    gradient_of(weight).zero_()
                adam.step()
                for weight, master, total in zip(weights, masters, sums):
                    weight.copy_(master)
                    total.zero_()

        step()
        if on_gpu:
            state = torch.cuda.memory_allocated(device) - before
            torch.cuda.reset_peak_memory_stats(device)
        else:
            state, counted.peak = counted.live, 0
        step()
    return state, torch.cuda.max_memory_allocated(device) - before if on_gpu else counted.peak


def gradient_of(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad
