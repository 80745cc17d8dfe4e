"""Records the candidates that an exported model chooses, so that our own model can be compared with it.

A choice is a step function. Where two candidates differ by no more than rounding, two implementations may choose
differently, and their results then differ by more than rounding. So our model takes the exported model's choice where
that is as good as its own, and its own everywhere else. For a model without banks this does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_tf.convert.agreement import TOLERANCES
from megatron_tf.model.routing import BALANCE_SPEED, choose
from megatron_tf.model.sparse_pattention import SparsePattention

_BANK = "TokenBank"  # the class in the exported code


class Choices:
    """The choices of the model `exported`. Its banks are in the same order as our own model's projections."""

    def __init__(self, exported: nn.Module):
        self._banks: list[Any] = [module for module in exported.modules() if type(module).__name__ == _BANK]
        self._taken: list[list[Tensor]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records the choices of all calls in the block, and forgets earlier ones."""
        self._taken = [[] for _ in self._banks]
        for bank, calls in zip(self._banks, self._taken):
            bank.choose = _recording(bank.choose, calls)
        try:
            yield
        finally:
            for bank in self._banks:
                del bank.choose

    @contextmanager
    def replayed(self, network: nn.Module, batch: int, samples: slice = slice(None), start: int = 0) -> Iterator[None]:
        """In the block `network` makes the recorded choices where they are as good as its own.

        `batch`: number of recorded samples.  `samples`, `start`: it reads these of them, from position `start` on.
        """
        projections = [module for module in network.modules() if isinstance(module, SparsePattention)]
        for projection, calls in zip(projections, self._taken, strict=True):
            taken = [call.unflatten(0, (batch, -1)) for call in calls]
            # With a cache each call has only new positions; without one the last call has all of them.
            whole = torch.cat(taken, 1) if taken[-1].shape[1] == 1 else taken[-1]
            projection.choose = _as_good(whole[samples, start:].transpose(0, 1).flatten(0, 1))
        try:
            yield
        finally:
            for projection in projections:
                projection.choose = choose


def _recording(choose: Callable[[Tensor], Tensor], calls: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def recording(logits: Tensor) -> Tensor:
        calls.append(choose(logits))
        return calls[-1]

    return recording


def _as_good(other: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A choice like `routing.choose` that takes `other` [rows, slots] where rounding decides between the two."""

    def choosing(logits: Tensor, balance: Tensor) -> Tensor:
        own = choose(logits, balance)
        scores = logits + BALANCE_SPEED * balance
        best, others = (scores.gather(-1, chosen.unsqueeze(-1)).squeeze(-1) for chosen in (own, other))
        return torch.where(best - others <= TOLERANCES[torch.float32] * scores.abs().max(), other, own)

    return choosing
