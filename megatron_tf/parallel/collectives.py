"""Collectives, and pairs of them for the forward and backward pass, of which tensor parallelism is made.

Only this module calls torch.distributed collectives on activations. No function changes its input, and each is the
identity for a group of one.

| function | forward | backward | use |
|---|---|---|---|
| `copy_to` | identity | all-reduce | a replicated tensor enters sharded work |
| `reduce_from` | all-reduce | identity | partial results become whole on every rank |
| `gather_together` | one all-gather of rows and of a few numbers a row | one reduce-scatter | as `gather_from` |
| `gather_from` | all-gather along a dim | reduce-scatter | a split tensor enters sharded work whole |
| `scatter_to` | reduce-scatter along a dim | all-gather | partial results become whole, split |
| `scatter_together` | one reduce-scatter of several | one all-gather | as `scatter_to` |
| `exchange` | all-to-all: splits one dim, gathers another | the inverse | between positions and heads |

Those that a tensor enters sharded work by take a `Meanwhile`: what is computed while its gradient travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_tf.parallel import direct
from megatron_tf.parallel.groups import Group
from megatron_tf.parallel.meanwhile import Meanwhile

# torch 2.13 renamed these two and warns about the old names, the only ones in 2.11 and 2.12.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_reduce(x: Tensor, group: Group, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The reduction of `x` over the group, of the same shape; `x` itself for a group of one. Not differentiable."""
    if group.size == 1:
        return x
    if _is_direct(group) and direct.reduces(x, group, op):
        return direct.begin_all_reduce(x, group, op)()
    out = x.clone(memory_format=torch.contiguous_format)
    with group.around():
        dist.all_reduce(out, op=op, group=group.handle)
    return out


def begin_all_reduce(x: Tensor, group: Group) -> Callable[[], Tensor]:
    """Starts a sum over the group. Returns a function that waits for it, so that other work can hide the exchange."""
    if group.size == 1 or torch.compiler.is_compiling():  # a compiled graph has only collectives that wait
        return lambda: all_reduce(x, group)
    if _is_direct(group) and direct.reduces(x, group):
        return direct.begin_all_reduce(x, group)
    out = x.clone(memory_format=torch.contiguous_format)
    return group.result_of(dist.all_reduce(out, group=group.handle, async_op=True), out)


def all_gather(x: Tensor, group: Group, dim: int) -> Tensor:
    """Concatenation of every rank's `x` (equal shapes) along `dim`. Not differentiable."""
    if group.size == 1:
        return x
    dim %= x.dim()
    if _is_direct(group):
        out = direct.begin_all_gather(x, group)()
    else:
        out = x.new_empty((group.size, *x.shape))
        with group.around():
            _all_gather(out.view(-1), x.contiguous().view(-1), group=group.handle)
    return out.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's slice along `dim` of the sum of `x` over the group. Not differentiable."""
    if group.size == 1:
        return x
    parts = _parts(x, group, dim)
    if _is_direct(group):
        return direct.begin_reduce_scatter(parts, group)()
    out = torch.empty_like(parts[0])
    with group.around():
        _reduce_scatter(out.view(-1), parts.view(-1), group=group.handle)
    return out


def begin_reduce_scatter(x: Tensor, group: Group, dim: int) -> Callable[[], Tensor]:
    """Starts `reduce_scatter`. Returns a function that waits for it, so that other work can hide the exchange."""
    if group.size == 1 or torch.compiler.is_compiling():
        return lambda: reduce_scatter(x, group, dim)
    parts = _parts(x, group, dim)
    if _is_direct(group):
        return direct.begin_reduce_scatter(parts, group)
    out = torch.empty_like(parts[0])
    return group.result_of(_reduce_scatter(out.view(-1), parts.view(-1), group=group.handle, async_op=True), out)


def _parts(x: Tensor, group: Group, dim: int) -> Tensor:
    """The slices of `x` along `dim`, one for each rank, contiguous.

    They are sent flat: gloo requires dim 0 of the input to be the group's size times dim 0 of the output.
    """
    return x.unflatten(dim, (group.size, -1)).movedim(dim % x.dim(), 0).contiguous()


def _is_direct(group: Group) -> bool:
    # a compiled graph has only collectives that the compiler knows
    return group.direct and not torch.compiler.is_compiling()


def all_to_all(x: Tensor, group: Group, split: int, gather: int) -> Tensor:
    """Sends slice r of `x` along `split` to rank r; concatenates the slices that it receives along `gather`.

    Not differentiable.
    """
    if group.size == 1:
        return x
    parts = _parts(x, group, split)
    out = torch.empty_like(parts)
    with group.around():
        dist.all_to_all_single(out.view(-1), parts.view(-1), group=group.handle)
    return out.movedim(0, gather).flatten(gather, gather + 1)


def send(x: Tensor, rank: int) -> None:
    """Sends `x` to `rank` of the world, which must `receive` the same shape and type. Not differentiable."""
    dist.send(x.contiguous(), rank)


def receive(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rank: int) -> Tensor:
    """The tensor that `rank` of the world sends, of this shape and type. Not differentiable."""
    out = torch.empty(shape, dtype=dtype, device=device)
    dist.recv(out, rank)
    return out


def _after(finish: Callable[[], Tensor], meanwhile: Meanwhile | None) -> Tensor:
    """The result of an exchange that has begun."""
    if meanwhile is not None:
        meanwhile.do()
    return finish()


class _CopyTo(Function):
    @staticmethod
    def forward(ctx, x, group, meanwhile):
        ctx.group, ctx.meanwhile = group, meanwhile
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _after(begin_all_reduce(grad, ctx.group), ctx.meanwhile), None, None


class _ReduceFrom(Function):
    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _GatherFrom(Function):
    @staticmethod
    def forward(ctx, x, group, dim, meanwhile):
        ctx.group, ctx.dim, ctx.meanwhile = group, dim, meanwhile
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx, grad):
        return _after(begin_reduce_scatter(grad, ctx.group, ctx.dim), ctx.meanwhile), None, None, None


class _GatherTogether(Function):
    @staticmethod
    def forward(ctx, x, numbers, group, meanwhile):
        ctx.group, ctx.shapes, ctx.dtype = group, (x.shape, numbers.shape), numbers.dtype
        ctx.meanwhile = meanwhile
        # The bits of the numbers travel as elements of x's type, so that nothing is rounded.
        sent = torch.cat([x.reshape(-1), numbers.contiguous().view(x.dtype).view(-1)])
        ranks = all_gather(sent, group, 0).view(group.size, -1)
        whole, bits = ranks[:, : x.numel()], ranks[:, x.numel() :].contiguous()
        return (
            whole.reshape(-1, *x.shape[1:]),
            bits.view(numbers.dtype).view(-1, *numbers.shape[1:]),
        )

    @staticmethod
    def backward(ctx, grad, of_numbers):
        parts = [g.reshape(ctx.group.size, -1).to(grad.dtype) for g in (grad, of_numbers)]
        own = _after(begin_reduce_scatter(torch.cat(parts, 1).view(-1), ctx.group, 0), ctx.meanwhile)
        size = ctx.shapes[0].numel()
        return own[:size].view(ctx.shapes[0]), own[size:].view(ctx.shapes[1]).to(ctx.dtype), None, None


class _ScatterTo(Function):
    @staticmethod
    def forward(ctx, x, group, dim):
        ctx.group, ctx.dim = group, dim
        return reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad, ctx.group, ctx.dim), None, None


class _ScatterTogether(Function):
    @staticmethod
    def forward(ctx, group, dim, *tensors):
        ctx.group, ctx.dim = group, dim
        ranks = torch.stack([x.unflatten(dim, (group.size, -1)).movedim(dim, 0) for x in tensors], 1)
        # Copies: as views, one that is kept for the backward pass would keep the memory of all.
        return tuple(own.clone() for own in reduce_scatter(ranks, group, 0)[0])

    @staticmethod
    def backward(ctx, *grads):
        whole = all_gather(torch.stack(grads), ctx.group, ctx.dim + 1)
        return None, None, *whole.unbind()


class _Exchange(Function):
    @staticmethod
    def forward(ctx, x, group, split, gather):
        ctx.group, ctx.split, ctx.gather = group, split, gather
        return all_to_all(x, group, split, gather)

    @staticmethod
    def backward(ctx, grad):
        return all_to_all(grad, ctx.group, ctx.gather, ctx.split), None, None, None


def copy_to(x: Tensor, group: Group, meanwhile: Meanwhile | None = None) -> Tensor:
    """Identity forward, all-reduce backward."""
    return x if group.size == 1 else _CopyTo.apply(x, group, meanwhile)


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """All-reduce forward, identity backward."""
    return x if group.size == 1 else _ReduceFrom.apply(x, group)


def gather_from(x: Tensor, group: Group, dim: int, meanwhile: Meanwhile | None = None) -> Tensor:
    """All-gather along `dim` forward, reduce-scatter backward."""
    return x if group.size == 1 else _GatherFrom.apply(x, group, dim, meanwhile)


def gather_together(
    x: Tensor, numbers: Tensor, group: Group, meanwhile: Meanwhile | None = None
) -> tuple[Tensor, Tensor]:
    """`gather_from` along dim 0 of x [rows, ...] and numbers [rows, ...] in one exchange.

    The numbers have a type of at least x's precision. Their gradient travels in the type of x's gradient.
    """
    return (x, numbers) if group.size == 1 else _GatherTogether.apply(x, numbers, group, meanwhile)


def scatter_to(x: Tensor, group: Group, dim: int) -> Tensor:
    """Reduce-scatter along `dim` forward, all-gather backward."""
    return x if group.size == 1 else _ScatterTo.apply(x, group, dim)


def scatter_together(tensors: Sequence[Tensor], group: Group, dim: int) -> tuple[Tensor, ...]:
    """`scatter_to` of several tensors of equal shape, in one exchange."""
    if group.size == 1:
        return tuple(tensors)
    return _ScatterTogether.apply(group, dim % tensors[0].dim(), *tensors)


def exchange(x: Tensor, group: Group, split: int, gather: int) -> Tensor:
    """`x`, whole along dim `split` and a part along `gather` -> a part along `split`, whole along `gather`.

    The backward pass is the inverse exchange.
    """
    return x if group.size == 1 else _Exchange.apply(x, group, split % x.dim(), gather % x.dim())
