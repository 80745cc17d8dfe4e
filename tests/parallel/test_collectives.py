from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest
import torch
import torch.distributed as dist
from distributed import spawn, spawn_each

from megatron_tf.benchmark.counting import Counting
from megatron_tf.parallel import direct
from megatron_tf.parallel.collectives import (
    all_gather,
    all_reduce,
    begin_all_reduce,
    begin_reduce_scatter,
    copy_to,
    exchange,
    gather_from,
    gather_together,
    reduce_from,
    reduce_scatter,
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


def _everything(group, is_direct):
    group = replace(group, direct=is_direct)
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
    spawn_each(_everything, world_size, [(False,), (True,)])


def _in_order(group, dtype):
    """Each reduction and exchange, direct, against the ranks' own numbers reduced in their order."""
    group = replace(group, direct=True)
    xs = [_numbers(r, dtype) for r in range(group.size)]
    x = xs[group.rank]
    for op, of_two in direct.REDUCTIONS.items():
        assert torch.equal(all_reduce(x, group, op), reduce(of_two, xs)), op
        assert torch.equal(all_reduce(x.t(), group, op), reduce(of_two, xs).t()), op
    total = reduce(torch.add, xs)
    assert total.dtype == dtype and torch.equal(begin_all_reduce(x, group)(), total)
    assert torch.equal(all_gather(x.t(), group, -1), torch.cat([y.t() for y in xs], -1))
    for finished in (reduce_scatter(x, group, 0), begin_reduce_scatter(x, group, 0)()):
        assert torch.equal(finished, total.chunk(group.size)[group.rank])
    assert torch.equal(all_reduce(x[0, 0], group), total[0, 0])
    assert all_reduce(x[:0], group).shape == x[:0].shape
    assert torch.equal(x, _numbers(group.rank, dtype))


def _numbers(rank, dtype):
    return torch.randn(12, 5, generator=torch.Generator().manual_seed(rank)).mul(100).to(dtype)


@pytest.mark.parametrize("world_size", [2, 3])
def test_direct_exchanges_reduce_in_the_order_of_the_ranks(world_size):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int32, torch.int64)
    spawn_each(_in_order, world_size, [(dtype,) for dtype in dtypes])


def _large(group):
    group = replace(group, direct=True)
    most = direct.MOST_REDUCED // 4 // (group.size - 1)
    for numel, kind in ((most, "all_to_all"), (most + 1, "all_reduce")):
        with Counting() as counted:
            total = all_reduce(torch.full((numel,), group.rank + 1.0), group)
            again = begin_all_reduce(torch.full((numel,), group.rank + 1.0), group)()
        assert total.eq(6).all() and again.eq(6).all()
        assert {kind for kind, _ in counted.sent} == {kind}
    with Counting() as counted:
        product = all_reduce(torch.ones(2, dtype=torch.int32), group, dist.ReduceOp.PRODUCT)
    assert product.tolist() == [1, 1] and {kind for kind, _ in counted.sent} == {"all_reduce"}


def test_what_is_large_or_of_another_kind_is_left_to_gloo():
    spawn(_large, 3)
