from __future__ import annotations

import pytest
import torch
from distributed import spawn

from megatron_tf.parallel.collectives import (
    copy_to,
    exchange,
    gather_from,
    gather_together,
    reduce_from,
    scatter_to,
    scatter_together,
)
from megatron_tf.parallel.groups import SINGLE

PAIRS = [
    copy_to,
    reduce_from,
    lambda x, g: gather_from(x, g, 0),
    lambda x, g: scatter_to(x, g, -1),
    lambda x, g: exchange(x, g, -1, 0),
]


@pytest.mark.parametrize("collective", PAIRS)
def test_identity_on_one_process(collective):
    x = torch.randn(2, 4)
    assert collective(x, SINGLE) is x


def _everything(group):
    size, rank = group.size, group.rank
    xs = [torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(r), dtype=torch.float64) for r in range(size)]
    x = xs[rank].clone().requires_grad_()
    kept = x.detach().clone()

    def check(out, expected, expected_grad, grads):
        torch.testing.assert_close(out.detach(), expected)
        (grad,) = torch.autograd.grad(out, x, grads[rank])
        torch.testing.assert_close(grad, expected_grad)
        torch.testing.assert_close(x.detach(), kept)  # no collective changes its input

    total = torch.stack(xs).sum(0)
    check(copy_to(x, group), xs[rank], total, xs)
    check(reduce_from(x, group), total, xs[rank], xs)
    for dim in (0, 1, -1):
        whole = torch.cat(xs, dim)
        grads = [torch.cat([y * (r + 1) for y in xs], dim) for r in range(size)]
        check(gather_from(x, group, dim), whole, torch.stack(grads).sum(0).chunk(size, dim)[rank], grads)
    for dim in (0, -1):
        own = total.chunk(size, dim)[rank]
        parts = [y.chunk(size, dim)[0].contiguous() for y in xs]
        check(scatter_to(x, group, dim), own, torch.cat(parts, dim), parts)
        first, second = scatter_together((x, 2 * x), group, dim)
        torch.testing.assert_close(second.detach(), 2 * own)
        check(first + second, 3 * own, 3 * torch.cat(parts, dim), parts)
    for split, gather in ((-1, 0), (0, -1)):
        own = torch.cat([y.chunk(size, split)[rank] for y in xs], gather)
        grads = [torch.cat([y.chunk(size, split)[r] for y in xs], gather) * (r + 1) for r in range(size)]
        back = torch.cat([grads[r].chunk(size, gather)[rank] for r in range(size)], split)
        check(exchange(x, group, split, gather), own, back, grads)
    rows_with_numbers(xs, group)


def rows_with_numbers(xs, group):
    """Numbers in fp32 keep every bit next to rows in bf16, and both have their gradients."""
    numbers = [y[..., :3].sum(0, keepdim=True).expand(4, -1, -1).float() for y in xs]
    own = xs[group.rank].bfloat16().requires_grad_(), numbers[group.rank].clone().requires_grad_()
    gathered = gather_together(*own, group)
    assert torch.equal(gathered[0], torch.cat(xs).bfloat16()) and torch.equal(gathered[1], torch.cat(numbers))
    weights = [torch.arange(1.0, tensor.numel() + 1).view(tensor.shape).fmod(3) for tensor in gathered]
    grads = torch.autograd.grad(gathered, own, [w.to(t.dtype) for w, t in zip(weights, gathered)])
    for grad, weight, tensor in zip(grads, weights, own):
        assert torch.equal(grad, group.size * weight.chunk(group.size)[group.rank].to(tensor.dtype))


@pytest.mark.parametrize("world_size", [2, 4])
def test_values_and_gradients(world_size):
    spawn(_everything, world_size)
