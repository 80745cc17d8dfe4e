"""The likelihood of continuations of contexts, at any layout, as multiple-choice tasks need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tf.errors import ArgumentError
from megatron_tf.evaluation.perplexity import token_losses
from megatron_tf.model.stage import Stage
from megatron_tf.tasks.classes import argmax
from megatron_tf.tasks.language_model.layers import first_row

Request = tuple[list[int], list[int]]  # context and continuation, neither of them empty
Answer = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would give the continuation
Ask = Callable[[Sequence[Request]], list[Answer]]


class Scorer:
    """A model on all ranks. The first rank calls it with requests; the others `follow` until it calls `release`."""

    def __init__(
        self, stage: Stage, *, max_length: int, batch_size: int, data_rank: int, data_size: int, is_reporter: bool
    ):
        """`max_length`: most tokens that the model reads at once.  `is_reporter`: true on one rank of each replica,
        which must have logits; its answers count."""
        self._stage = stage
        self._max_length = max_length
        self._batch_size = batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._is_reporter = is_reporter

    def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """The answer to each request, in their order. For the first rank. ArgumentError for an empty context or
        continuation."""
        _check(requests)
        _broadcast(list(requests))
        return self._answers(requests)

    def follow(self) -> None:
        """Take part in the requests of the first rank until it calls `release`. For the other ranks."""
        while (requests := _broadcast(None)) is not None:
            self._answers(requests)

    def release(self) -> None:
        """Ends `follow` on the other ranks. For the first rank, after its last request."""
        _broadcast(None)

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        device = next(self._stage.parameters()).device
        found = torch.zeros(len(requests), 2, dtype=torch.float64, device=device)
        for batch in self._own_batches(requests):
            own = score_continuations(self._stage, [requests[at] for at in batch], self._max_length)
            if own is not None and self._is_reporter:
                found[batch] = own
        if dist.is_initialized():
            dist.all_reduce(found)
        return [(likelihood, bool(greedy)) for likelihood, greedy in found.tolist()]

    def _own_batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Positions of this rank's requests in batches of similar length. The longest come first, so that a lack of
        memory shows at once."""
        order = sorted(range(len(requests)), key=lambda at: -len(requests[at][0]) - len(requests[at][1]))
        batches = [order[first : first + self._batch_size] for first in range(0, len(order), self._batch_size)]
        return batches[self._data_rank :: self._data_size]


@torch.no_grad()
def score_continuations(stage: Stage, requests: Sequence[Request], max_length: int) -> Tensor | None:
    """fp64 [requests, 2] at the last stage: log-likelihood in nats, and 1 where greedy decoding gives the continuation.
    None at other stages.

    A request of more than `max_length` + 1 tokens loses its beginning; if the continuation alone is that long, only its
    predicted part counts. ArgumentError for an empty context or continuation.
    """
    _check(requests)
    rows = [[*context, *continuation][-(max_length + 1) :] for context, continuation in requests]
    longest = max(len(row) for row in rows) - 1
    longest += -longest % stage.tensor.length_multiple
    ids, labels, counts = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(3))
    for at, (row, (_, continuation)) in enumerate(zip(rows, requests)):
        size = len(row) - 1
        ids[at, :size], labels[at, :size] = torch.tensor(row[:-1]), torch.tensor(row[1:])
        counts[at, max(0, size - len(continuation)) : size] = 1
    device = next(stage.parameters()).device
    ids, labels, counts = ids.to(device), labels.to(device), counts.to(device)
    logits = stage.infer(ids)
    if logits is None:
        return None
    likelihood = -(token_losses(stage, logits, labels).double() * counts).sum(-1)
    likeliest = argmax(logits, first_row(stage.model, stage.tensor.group), stage.tensor.group).mT
    greedy = ((likeliest == labels) | (counts == 0)).all(-1)
    return torch.stack((likelihood, greedy.double()), -1)


def _check(requests: Sequence[Request]) -> None:
    """ArgumentError for an empty part: an empty continuation, or a token without a context, would count as certain."""
    for number, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            part = "context" if continuation else "continuation"
            raise ArgumentError(f"requests[{number}]: its {part} is empty. Give at least one token of each.")


def _broadcast(value: list[Request] | None) -> list[Request] | None:
    """The first rank's value, on all ranks."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
