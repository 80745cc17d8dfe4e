"""Muon: the momentum of a matrix, with all its singular values brought near 1; AdamW for everything else.

The direction M [n, d] of a matrix (Nesterov momentum of its gradients) is divided by its Frobenius norm and goes
through five Newton-Schulz iterations

    X ← aX + bX(XᵀX) + cX(XᵀX)²,        (a, b, c) = (3.4445, −4.7750, 2.0315),

after which W ← W − lr (0.2 √max(n, d) X + λW). The factor makes updates as large as AdamW's, so both share one learning
rate (Liu et al. 2025, "Muon is scalable for LLM training"; iteration by Jordan et al. 2024).

Every iterate is X·P with P a polynomial of G = XᵀX, and all of these commute. So the iteration needs only G [d, d], the
sum of the Gram matrices of each rank's rows. Ranks therefore send one all-reduce of d² numbers for each matrix, however
its rows are spread over tensor- and data-parallel ranks, and apply P to their own rows.
G squares the condition number, so G, P and M·P are computed in fp64. In fp32 the gradient norms of the next steps were
40 times as far from those of the exact iteration. Candidates, and matrices of fewer rows than columns, are whole on a
rank. They go through the iteration on X itself, where fp32 is enough.

The keys, or values, of each candidate of a bank are a matrix of their own: no position uses a slot's candidates
together. As one matrix a bank has the singular vectors of all its candidates mixed, and split growth gains half as much
(docs/growth.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from megatron_tf.config.fields import Beta
from megatron_tf.config.sections.optimizer import Optimizer
from megatron_tf.optimizers.adamw import AdamW, AdamWOptimizer
from megatron_tf.optimizers.base import MatrixRule, UpdateBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
# the root mean square of AdamW's updates in practice, divided by the learning rate
UPDATE_SIZE = 0.2


class MuonOptimizer(AdamWOptimizer):
    type: Literal["muon"] = "muon"  # type: ignore[assignment]
    """How parameters are updated: matrices of blocks by Muon, all others by AdamW."""
    momentum: Beta = 0.95
    """Decay rate of the momentum of matrices. `betas` are for AdamW."""


class Muon(AdamW, MatrixRule):
    """Keeps what AdamW keeps, so that a run can go from one to the other: `exp_avg` of a matrix decays by `momentum`,
    and its `exp_avg_sq` is kept up to date though Muon does not read it."""

    section: ClassVar[type[Optimizer]] = MuonOptimizer
    # A candidate gets as large updates as a token that every position uses, from fewer positions. Measured with 4 and
    # 16 candidates: docs/growth.md.
    candidate_lr_factor = 0.6
    # Updates of a router are as large as those of other matrices, however small its gradient. At the rate of its
    # candidates they choose others all the time: docs/growth.md.
    router_lr_factor = 0.1
    why_not_elsewhere = "it keeps no average of the weights"

    def directions(self, optimizer: Optimizer, batch: UpdateBatch) -> list[Tensor]:
        import torch

        settings = as_muon(optimizer)
        gradients, averages = list(batch.gradients), list(batch.states["exp_avg"])
        torch._foreach_lerp_(averages, gradients, 1 - settings.momentum)
        squares = torch._foreach_mul(gradients, gradients)
        torch._foreach_lerp_(list(batch.states["exp_avg_sq"]), squares, 1 - settings.betas[1])
        torch._foreach_add_(list(batch.ages), 1)
        return list(torch._foreach_lerp(gradients, averages, settings.momentum))

    def transform(self, gram: Tensor) -> Tensor:
        import torch

        a, b, c = COEFFICIENTS
        trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        norm = trace.clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
        gram = gram / norm.square()
        unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        step = a * unit + b * gram + c * (gram @ gram)
        product = step / norm
        for _ in range(1, ITERATIONS):
            gram = step @ gram @ step
            step = a * unit + b * gram + c * (gram @ gram)
            product = product @ step
        return product

    def update_whole(self, matrices: Tensor, add_products: Callable[..., Tensor]) -> Tensor:
        import torch

        a, b, c = COEFFICIENTS
        if matrices.shape[1] > matrices.shape[2]:
            return self.update_whole(matrices.mT, add_products).mT
        x, least = matrices.contiguous(), torch.finfo(matrices.dtype).tiny
        # First by the largest number: the momentum of candidates without use gets so small that its squares are 0.
        x = x / x.abs().amax(dim=(1, 2), keepdim=True).clamp_min(least)
        x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_min(least)
        square = x.new_empty(*x.shape[:2], x.shape[1])
        polynomial, other = torch.empty_like(square), torch.empty_like(x)
        for _ in range(ITERATIONS):
            add_products(square, x, x.mT, beta=0, symmetric=True)
            add_products(square, square, square, alpha=c, beta=b, symmetric=True, out=polynomial)
            x, other = add_products(x, polynomial, x, beta=a, out=other), x
        return x

    def size(self, shape: Sequence[int]) -> float:
        return UPDATE_SIZE * max(shape) ** 0.5

    def reference(self, optimizer: Optimizer, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        return _plain(as_muon(optimizer), groups)


def as_muon(optimizer: Optimizer) -> MuonOptimizer:
    """`optimizer` itself, as the type that the caller knows it to have."""
    assert isinstance(optimizer, MuonOptimizer), optimizer.type
    return optimizer


def _plain(settings: MuonOptimizer, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """Muon on whole matrices by the iteration on X itself, and torch's AdamW.

    Each parameter of a group is a stack of matrices of `matrix_rows` rows; with 0 it holds none.
    """
    import torch

    class PlainMuon(torch.optim.AdamW):
        @torch.no_grad()
        def step(self, closure=None):
            a, b, c = COEFFICIENTS
            for group in self.param_groups:
                rows = group["matrix_rows"]
                for weight in group["params"] if rows else ():
                    gradient, weight.grad = weight.grad, None
                    if gradient is None:
                        continue
                    momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                    momentum.mul_(settings.momentum).add_(gradient, alpha=1 - settings.momentum)
                    x = (1 - settings.momentum) * gradient + settings.momentum * momentum
                    x = x.unflatten(0, (-1, rows))
                    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
                    for _ in range(ITERATIONS):
                        square = x.mT @ x
                        x = a * x + x @ (b * square + c * square @ square)
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(x.flatten(0, 1), alpha=group["lr"] * UPDATE_SIZE * max(x.shape[1:]) ** 0.5)
            # matrices have no gradients now, so AdamW skips them
            return super().step()

    return PlainMuon(list(groups), lr=settings.lr, betas=settings.betas, eps=settings.eps)


MUON = Muon()
