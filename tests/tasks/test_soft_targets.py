"""The loss of soft targets and the rank of a class, against plain PyTorch, whole and split over two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.nn import functional as F

from megatron_tf.config.topology import Topology
from megatron_tf.errors import exit_now
from megatron_tf.parallel.groups import SINGLE, make_group
from megatron_tf.runtime.local_ranks import start_ranks
from megatron_tf.state.parameters import shard_range
from megatron_tf.tasks.soft_targets import rank_of_class, soft_cross_entropy
from megatron_tf.verification.layout import joined

CLASSES = 11


def made_up() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits fp64 and targets of 7 samples; the last one does not count."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(7, CLASSES, generator=generator, dtype=torch.float64)
    targets = torch.softmax(3 * torch.randn(7, CLASSES, generator=generator, dtype=torch.float64), 1)
    targets[-1] = 0
    return logits, targets


def test_loss_and_gradient_are_those_of_torch():
    logits, targets = made_up()
    own, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    losses = soft_cross_entropy(own, targets, 0, SINGLE)
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    (losses * weights).sum().backward()
    wanted = F.cross_entropy(expected, targets, reduction="none")
    (wanted * weights).sum().backward()
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.grad, expected.grad, rtol=1e-12, atol=1e-12)
    assert losses[-1] == 0 and not own.grad[-1].any()


def test_the_loss_of_low_precision_is_in_fp32():
    logits, targets = made_up()
    low = logits.bfloat16().requires_grad_()
    losses = soft_cross_entropy(low, targets.float(), 0, SINGLE)
    losses.sum().backward()
    assert losses.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(
        losses.double(), F.cross_entropy(low.double(), targets, reduction="none"), rtol=1e-5, atol=1e-5
    )


def test_the_rank_is_the_place_in_a_stable_order():
    logits = torch.tensor([[1.0, 3, 3, 2], [0, 0, 0, 0], [5, 1, 2, 3]])
    order = logits.argsort(dim=1, descending=True, stable=True)
    for label in range(4):
        found = rank_of_class(logits, torch.full((3,), label), 0, SINGLE)
        assert found.tolist() == (order == label).int().argmax(1).tolist()


def test_what_is_no_number_is_never_right():
    logits = torch.tensor([[torch.nan, 1, 0], [torch.nan] * 3])
    assert (rank_of_class(logits, torch.tensor([1, 2]), 0, SINGLE) >= 1).all()


def _split(rank: int, folder: str) -> None:
    with joined([], rank, 2, folder):
        group = make_group(Topology(2, 1, 1), "tensor", 60)
        logits, targets = made_up()
        start, stop = shard_range(CLASSES, 2, rank)
        own = logits[:, start:stop].clone().requires_grad_()
        losses = soft_cross_entropy(own, targets, start, group)
        losses.sum().backward()
        ranks = rank_of_class(own.detach(), targets.argmax(1), start, group)
        found = [losses.tolist(), own.grad.tolist(), ranks.tolist()]
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    exit_now()


def test_classes_that_are_split_unevenly_give_the_same(tmp_path: Path):
    start_ranks(_split, 2, str(tmp_path))
    logits, targets = made_up()
    whole = logits.clone().requires_grad_()
    losses = soft_cross_entropy(whole, targets, 0, SINGLE)
    losses.sum().backward()
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    gradient = torch.cat([torch.tensor(gradient, dtype=torch.float64) for _, gradient, _ in found], 1)
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-12)
    for own, _, ranks in found:
        torch.testing.assert_close(torch.tensor(own, dtype=torch.float64), losses.detach(), rtol=1e-12, atol=1e-12)
        assert ranks == rank_of_class(logits, targets.argmax(1), 0, SINGLE).tolist()
